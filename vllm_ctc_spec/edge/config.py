"""What `vllm-ctc edge` was asked for. Kept free of torch, so that `--help` starts quickly."""

import dataclasses
import math
from pathlib import Path

from vllm_ctc_spec.edge.loop import Patience
from vllm_ctc_spec.edge.protocol import Policy
from vllm_ctc_spec.errors import EdgeError
from vllm_ctc_spec.training.config import option, setting

MODEL, NGRAM = "model", "ngram"
DRAFTS, PROMPTS = "drafts", "prompts"


@dataclasses.dataclass(frozen=True)
class EdgeConfig:
    server: str = setting("vLLM's API server, such as http://host:8000", metavar="URL")
    model: str = setting("folder of a small causal language model with the tokenizer of the server's", metavar="DIR")
    prompt: str | None = setting("the user's message (default: standard input)", None, metavar="TEXT")
    completion: bool = setting("continue the prompt as it is, without the server's chat template", False)
    draft_with: str = setting(
        f"{MODEL}: the small model; {NGRAM}: copies of the text so far; the folder need only hold the tokenizer",
        MODEL,
        choices=(MODEL, NGRAM),
    )
    rounds: str = setting(
        f"{DRAFTS}: a request carries its draft, for a server with ctc_sources; {PROMPTS}: one prompt for each prefix "
        "of the draft, for any vLLM server",
        DRAFTS,
        choices=(DRAFTS, PROMPTS),
    )
    draft_tokens: int = setting("the longest draft of a round", 8)
    min_confidence: float = setting("a draft ends before a token that the device is less sure of, 0 to 1", 0.3)
    round_tokens: int | None = setting("tokens that a round asks the server for (default: one more than drafts)", None)
    max_tokens: int = setting("longest answer", 256)
    temperature: float = setting("of the answer, 0 = greedy", 0.0)
    seed: int | None = setting("of a sampled answer (default: a random one)", None)
    timeout: float = setting("seconds without a word after which the server counts as away", 10.0)
    api_key: str | None = setting("what the server was started with (default: the variable OPENAI_API_KEY)", None)
    json: Path | None = setting("write tokens, which of them are verified, and counts", None, metavar="FILE")

    def __post_init__(self) -> None:
        if self.round_tokens is None:
            object.__setattr__(self, "round_tokens", self.draft_tokens + 1)
        for name, least in (("draft_tokens", 0), ("round_tokens", 1), ("max_tokens", 1), ("temperature", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise EdgeError(f"{option(name)} must be {least} or more, not {getattr(self, name)}.")
        if not 0 <= self.min_confidence <= 1:
            raise EdgeError(f"--min-confidence must be between 0 and 1, not {self.min_confidence:g}.")
        if not 0 < self.timeout < math.inf:
            raise EdgeError(f"--timeout must be more than 0, not {self.timeout:g}.")
        if not self.server.startswith(("http://", "https://")):
            raise EdgeError(f"--server must be a URL such as http://host:8000, not {self.server!r}.")

    @property
    def policy(self) -> Policy:
        assert self.round_tokens is not None
        return Policy(self.draft_tokens, self.min_confidence, self.round_tokens)

    @property
    def patience(self) -> Patience:
        return Patience(timeout=self.timeout)
