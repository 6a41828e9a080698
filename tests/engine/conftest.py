"""Real engines for the tests: tiny random targets with drafters that agree with them now and then, and the demo pair.

Random weights agree about nothing, and a test whose drafts are all rejected shows little. `tiny_pair` therefore gives
the drafter's label-conditional head the target's own dependence on the last token (embedding and head); the target's
layers disturb it. Part of the drafts is then accepted, without any training.
"""

import contextlib
import functools
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pair import TINY, read_pair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.serving import cpu, plugin

CHARACTERS = [*map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]  # the last two: space, line break
SPECIAL = ["<pad>", "<eos>"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
HIDDEN = 64
SOURCES_VARIABLE = "CTC_TEST_SOURCES"  # of all trees that tests draft, for `test_sources.py`
# Trees of full size in batches of any size.
TREE = {
    "ctc_draft": "tree", "num_speculative_tokens": 16, "ctc_tree_rows": 2**20,
    **({"ctc_sources": os.environ[SOURCES_VARIABLE]} if SOURCES_VARIABLE in os.environ else {}),
}  # fmt: skip
FEW_LABELS = {"draft_vocab_size": 60}  # of 98 tokens
TRANSITIONS = {"lattice": "transitions", "transition_rank": 16}
SPECFORMER = {"architecture": "specformer"}
DRAFTERS = {
    "ctc": {}, "transitions": TRANSITIONS, "slots": {"lattice": "slots"},
    "ctc, few labels": FEW_LABELS, "transitions, few labels": TRANSITIONS | FEW_LABELS,
    "specformer": SPECFORMER,
    "specformer, causal": SPECFORMER | TRANSITIONS | FEW_LABELS | {"frame_attention": "causal", "positional_rank": 24},
}  # fmt: skip
DRAFTS = {"chain": {}, "tree": TREE}  # options of the speculative config for tests that run with both


@dataclass(frozen=True)
class Pair:
    """Folders of a target and its drafter."""

    target: Path
    drafter: Path


def save_tokenizer(folder: Path, tokens: list[str] = SPECIAL + CHARACTERS) -> int:
    """By default the special tokens, then one token for each ASCII character; returns the vocabulary size."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_target(folder: Path, vocab_size: int, seed: int, head_std: float = 0.5) -> LlamaForCausalLM:
    """A random Llama whose layers matter and whose logits spread, by about eight times `head_std`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=head_std)
    model.save_pretrained(folder)
    return model


def save_drafter(folder: Path, target: LlamaForCausalLM, seed: int, **overrides: int | str) -> CTCDrafter:
    """A random drafter, every parameter of it at work, whose Markov head copies the target's last-token dependence."""
    torch.manual_seed(seed)
    settings = {"num_frames": 12, "num_labels": 4, "markov_rank": HIDDEN, "num_layers": 2, **overrides}
    config = DrafterConfig.for_target(target.config.get_text_config(), **settings)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    token_ids = None
    if config.has_draft_vocabulary:
        token_ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    drafter = CTCDrafter(config, embedding, head, token_ids)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
        # Frames spread over the vocabulary, so that the Markov head decides between their tokens.
        drafter.norm.weight.mul_(0.25)
        if drafter.markov_head is not None:
            inputs = torch.nn.functional.rms_norm(embedding, embedding.shape[1:])
            if token_ids is not None:
                inputs = torch.cat([inputs[token_ids], inputs.mean(0, keepdim=True)])
            drafter.markov_head.embedding.weight.copy_(inputs)
            drafter.markov_head.output.weight.copy_(drafter.draft_head)
    drafter.save(folder)
    return drafter


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory) -> Pair:
    """A target that speaks ASCII, and a drafter with T = 12 frames for 4 labels."""
    folder = tmp_path_factory.mktemp("tiny_pair")
    pair = Pair(folder / "target", folder / "drafter")
    vocab_size = save_tokenizer(pair.target)
    save_drafter(pair.drafter, save_target(pair.target, vocab_size, seed=3), seed=4)
    return pair


@pytest.fixture(scope="session")
def kind_of_pair(tiny_pair, tmp_path_factory) -> Callable[[str], Pair]:
    """kind_of_pair(one of DRAFTERS): `tiny_pair` with a drafter of that kind."""

    @functools.cache
    def make(kind: str) -> Pair:
        pair = Pair(tiny_pair.target, tmp_path_factory.mktemp("drafter"))
        save_drafter(pair.drafter, LlamaForCausalLM.from_pretrained(pair.target), seed=4, **DRAFTERS[kind])
        return pair

    return make


@pytest.fixture(scope="session")
def demo_pair() -> Pair:
    """The trained pair that the repository carries."""
    embedded = read_pair(TINY)
    pair = Pair(embedded.target, embedded.drafter)
    for folder in (pair.target, pair.drafter):
        assert (folder / "config.json").is_file(), f"the repository's own model is missing: {folder}"
    return pair


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """make_pair(folder, vocab_size, seed, head_std, **drafter): a pair without tokenizer."""

    def make(folder: Path, vocab_size: int, seed: int, head_std: float, **drafter: int) -> Pair:
        pair = Pair(folder / "target", folder / "drafter")
        save_drafter(pair.drafter, save_target(pair.target, vocab_size, seed, head_std), seed + 1, **drafter)
        return pair

    return make


class Engine(LLM):
    """An in-process engine that counts for itself: Prometheus' registry only knows the latest engine of a process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counters: Counter[str] = Counter()
        manager = self.llm_engine.logger_manager
        self._record, manager.record = manager.record, self._count

    def _count(self, scheduler_stats, iteration_stats, **others) -> None:
        self.counters["hits"] += scheduler_stats.prefix_cache_stats.hits
        self.counters["hits after preemption"] += scheduler_stats.prefix_cache_stats.preempted_hits
        if iteration_stats is not None:
            self.counters["preemptions"] += iteration_stats.num_preempted_reqs
        drafting = scheduler_stats.spec_decoding_stats
        if drafting is not None:
            self.counters["drafts"] += drafting.num_drafts
            self.counters["drafted"] += drafting.num_draft_tokens
            self.counters["accepted"] += drafting.num_accepted_tokens
        self._record(scheduler_stats=scheduler_stats, iteration_stats=iteration_stats, **others)

    @property
    def acceptance_length(self) -> float:
        """Tokens per step of a request since the counters were last cleared, the target's own included."""
        return 1 + self.counters["accepted"] / self.counters["drafts"]


@pytest.fixture(scope="session", autouse=True)
def classes_inspected_here() -> Iterator[None]:
    """vLLM looks at a model's class in a process of its own, so as not to initialise CUDA in this one: about eight
    seconds for each architecture that its cache does not know yet. On a CPU there is no reason to."""
    with pytest.MonkeyPatch.context() as environment:
        if current_platform.is_cpu():
            environment.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., Engine]]:
    """engine(target, speculative_config or None, **options): an in-process engine on Model Runner V2, freed with the
    module. Engines without drafter run on the same runner, so that nothing but the drafter differs."""
    engines: list[Engine] = []
    environment = pytest.MonkeyPatch()
    environment.setenv(plugin.V2_VARIABLE, "1")
    # vLLM collects garbage several times an engine, about a second each with all that is imported here.
    environment.setattr(gc, "collect", lambda *_: 0)
    if cpu.is_needed():
        cpu.install()

    def start(target: Path, speculative_config: dict | None = None, **options) -> Engine:
        settings = {"max_model_len": 256, "max_num_seqs": 8, "num_gpu_blocks_override": 256, "seed": 0, **options}
        llm = Engine(
            str(target),
            dtype="float32",
            enforce_eager=True,
            disable_log_stats=False,
            speculative_config=speculative_config,
            **settings,
        )
        engines.append(llm)
        return llm

    yield start
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    engines.clear()
    cleanup_dist_env_and_memory()
    environment.undo()
    gc.collect()


@contextlib.contextmanager
def any_scheduling() -> Iterator[None]:
    """Asynchronous scheduling is served where it is asked for: on a CPU vLLM turns it off as not worth it there."""
    platform = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))
        yield


@pytest.fixture
def asynchronous() -> Iterator[dict[str, bool]]:
    """An engine's options for asynchronous scheduling."""
    with any_scheduling():
        yield {"async_scheduling": True}


@pytest.fixture(scope="module")
def plain(engine, tiny_pair) -> Engine:
    """The tiny target without drafter, which can give the scores of all tokens (`ties.differences` asks for them)."""
    return engine(tiny_pair.target, max_logprobs=-1)
