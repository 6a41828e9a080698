"""What drafts on a device: a small transformers model, or the n-grams of the text itself."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vllm_ctc_spec.edge.protocol import Drafted, common_length
from vllm_ctc_spec.serving.cpu.noise import gumbel


class ModelDevice:
    """A causal language model with the target's tokens, which draws them as the server does.

    The server's draw is the token with the largest `logits / temperature + noise`, where the noise depends on the
    request's seed, the position and the token alone (Model Runner V2). The device adds the same noise to its own
    logits: where the two models agree about the law, they agree about the draw.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, temperature: float = 0.0, seed: int = 0):
        self.model = model.eval()
        self.vocab_size = vocab_size  # of the tokenizer: models may have more rows
        self.num_rows = model.get_input_embeddings().weight.shape[0]
        self.max_length = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.temperature, self.seed = temperature, seed
        self._cache = DynamicCache()
        self._cached: list[int] = []  # the tokens whose keys and values it holds

    @torch.inference_mode()
    def draft(self, tokens: Sequence[int]) -> Drafted | None:
        if len(tokens) > self.max_length or max(tokens) >= self.num_rows:
            return None
        scores = self._logits(tokens)[: self.vocab_size].float()
        if self.temperature > 0:
            noise = gumbel(self.seed, len(tokens) - 1, len(scores), use_fp64=False)
            scores = scores / self.temperature + torch.from_numpy(noise).to(scores.device)
        confidence, token = scores.softmax(0).max(0)
        return Drafted(int(token), float(confidence))

    def _logits(self, tokens: Sequence[int]) -> Tensor:  # [rows of the head]
        """After the last token. Only what the cache lacks is computed."""
        known = min(common_length(tokens, self._cached), len(tokens) - 1)
        if known < len(self._cached):
            self._cache.crop(known - len(self._cached))
        new = torch.tensor([list(tokens[known:])], device=self.model.device)
        output = self.model(new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cached = list(tokens)
        return output.logits[0, -1]


class NgramDevice:
    """Copies what followed the longest earlier match of the text's last tokens, the latest one of these. Needs no
    model. The confidence is the share of the matches that went on in this way, with one more that did not."""

    def __init__(self, longest: int = 4, shortest: int = 2):
        self.longest, self.shortest = longest, shortest

    def draft(self, tokens: Sequence[int]) -> Drafted | None:
        tokens = list(tokens)
        for length in range(self.longest, self.shortest - 1, -1):
            followers = self._followers(tokens, tokens[-length:])
            if followers:
                return Drafted(followers[-1], followers.count(followers[-1]) / (len(followers) + 1))
        return None

    @staticmethod
    def _followers(tokens: list[int], suffix: list[int]) -> list[int]:
        length, last = len(suffix), suffix[-1]
        return [
            tokens[end + 1]
            for end in range(length - 1, len(tokens) - 1)
            if tokens[end] == last and tokens[end - length + 1 : end + 1] == suffix
        ]
