"""What `--speculative-config` says about drafting: our own keys, checked against the drafter, and what vLLM is told."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_ctc_spec.accept.rule import AcceptanceRule
from vllm_ctc_spec.draft.cache_table import CacheTable
from vllm_ctc_spec.draft.source import SOURCES
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import expected_shapes
from vllm_ctc_spec.drafter.weights import check_weights
from vllm_ctc_spec.errors import DrafterConfigError, shown
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.plan.file import Plan
from vllm_ctc_spec.serving import limits
from vllm_ctc_spec.serving.acceptance import Drafts, choose_rule, told_to_vllm
from vllm_ctc_spec.serving.cpu.threads import is_large
from vllm_ctc_spec.serving.device import free_rows
from vllm_ctc_spec.serving.folder import find_drafter
from vllm_ctc_spec.serving.plan import plan_to_follow

logger = logging.getLogger("vllm.ctc_spec")

PREFIX = "ctc_"  # of our own keys
DRAFTS = ("chain", "tree")
SEARCHES = {"chain": ("prefix", "argmax"), "tree": ("prefix", "transform")}
DEFAULT_TREE_NODES = 31
DATA_PARALLEL_TREE_NODES = 7
"""At most, by default: 8 rows a request. With data parallelism vLLM drops SCHEDULE, so that large batches verify as
many rows a request as small ones (vllm/config/vllm.py:_maybe_disable_dynamic_sd_for_data_parallel)."""
MAX_TREE_ROWS = 2**20
MAX_CANDIDATES = 8192  # of all frames together: what one GPU program of the search holds
SCHEDULE = "num_speculative_tokens_per_batch_size"
KEEP_LAST_BLOCK = "disable_eagle_block_drop"
"""vLLM 0.32 computes the last block of every prefix-cache hit again, because an EAGLE head's keys of a token depend on
the next one, which may differ. A CTC drafter's depend on the target's hidden state alone, and every step writes them,
those without drafts too. vLLM 0.33 knows this of "dflash" by itself (`SpeculativeConfig.needs_eagle_block_drop`)."""
IN_A_PLAN = (
    "ctc_draft", "num_speculative_tokens", "ctc_tree_rows", SCHEDULE, "ctc_search", "ctc_tree_width", "ctc_tree_depth",
    "ctc_sources", "draft_sample_method", "rejection_sample_method", "ctc_acceptance",
)  # fmt: skip
"""Keys that contradict a plan: it says them, or was measured with their defaults."""
TREE_SIZES = (63, 31, 15, 7, 3)
"""Trees of a schedule. Few sizes, because a GPU captures a CUDA graph for each. With the anchor a tree has 64, 32, 16,
8 or 4 rows: tiles of attention and of matrix products are full, and one node more takes another tile."""
SMALLEST_TREE = 7
"""Of a schedule, because the drafter's forward costs the same for less (measured: benchmarks/results/tree_rows.md)."""


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """The keys of `--speculative-config` that begin with `ctc_`.

    draft: "chain" is one label sequence, verified by vLLM's rejection sampler; "tree" is up to
        `num_speculative_tokens` nodes, the most probable prefixes. None: a tree if the checkpoint has a `tree_nodes`.
    search: "prefix" follows the exact prefix probabilities. The paper's own ways: "argmax" (chain), the best symbol
        of each frame, collapsed (greedy drafts only), and "transform" (tree), the best alignments, collapsed.
    tree_width: symbols of each frame that a tree may use; None: `draft.ctc.default_width`.
    tree_depth: labels on a tree's longest path; None: the checkpoint's label horizon U.
    tree_rows: how many rows, anchors and nodes of all requests together, a step may verify: larger batches draft
        smaller trees. None: a default for the device.
    plan: file that says what is drafted at which batch size, in place of all of these (`serving/plan.py`).
    sources: where drafts come from: "ctc", the drafter; "cache", what followed the last tokens earlier in the request;
        "client", guesses of the answer that requests bring along; or several, as "ctc+cache". Without "ctc" no drafter
        is loaded.
    cache_table: file of `vllm-ctc cache`, followers that the cache knows from the start.
    acceptance, pivots, pivot_threshold: a rule of acceptance that is not exact (`acceptance.choose_rule`).
    """

    draft: str | None = None
    search: str = "prefix"
    tree_width: int | None = None
    tree_depth: int | None = None
    tree_rows: int | None = None
    plan: str | None = None
    sources: str = "ctc"
    cache_table: str | None = None
    acceptance: str | None = None
    pivots: str | None = None
    pivot_threshold: float | None = None

    @classmethod
    def given_in(cls, speculative: Mapping[str, Any]) -> "ServingOptions":
        """Our own keys of `--speculative-config`. Their values are not checked yet (DrafterConfigError)."""
        given = {key.removeprefix(PREFIX): speculative[key] for key in speculative if key.startswith(PREFIX)}
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                known = ", ".join(f"ctc_{n}" for n in names)
                raise DrafterConfigError(
                    f"Unknown speculative option {shown(f'ctc_{name}')}; the CTC options are: {known}."
                )
        return cls(**given)

    @property
    def source_names(self) -> tuple[str, ...]:
        """In the order of SOURCES (DrafterConfigError)."""
        given = self.sources.split("+") if isinstance(self.sources, str) else []
        if not given or len(set(given)) < len(given) or not set(given) <= set(SOURCES):
            raise DrafterConfigError(
                f"ctc_sources is {shown(self.sources)}; name one or more of {', '.join(SOURCES)}, joined by +, such as "
                "'ctc+cache'."
            )
        return tuple(name for name in SOURCES if name in given)

    def check_sources(self, vocab_size: int) -> None:
        """What holds with a drafter and without (DrafterConfigError). vocab_size: of the target."""
        names = self.source_names
        if names != ("ctc",) and self.draft == "chain":
            raise DrafterConfigError(
                f'ctc_sources {self.sources!r} drafts trees; remove "ctc_draft": "chain", or draft by \'ctc\' alone.'
            )
        if self.cache_table is not None:
            if "cache" not in names:
                raise DrafterConfigError("ctc_cache_table is read by the cache; add it to ctc_sources, as 'ctc+cache'.")
            CacheTable.load(self.cache_table).check_vocabulary(vocab_size)

    def without_drafter(self, speculative: Mapping[str, Any], vocab_size: int) -> "ServingOptions":
        """The same where "ctc" is not among the sources (DrafterConfigError)."""
        for key in ("model", "ctc_search", "ctc_tree_width", "ctc_tree_depth", "ctc_plan"):
            if speculative.get(key) is not None:
                raise DrafterConfigError(
                    f"{key} is about a CTC drafter, and ctc_sources {self.sources!r} uses none; remove {key}, or add "
                    "'ctc' to ctc_sources."
                )
        options = dataclasses.replace(self, draft=self.draft or "tree")
        if options.draft not in DRAFTS:
            raise DrafterConfigError(f"ctc_draft must be one of {', '.join(DRAFTS)}, not {shown(options.draft)}.")
        options.check_sources(vocab_size)
        options.check_rows(speculative)
        return options

    def check_rows(self, speculative: Mapping[str, Any]) -> None:
        if self.tree_rows is None:
            return
        if SCHEDULE in speculative:
            raise DrafterConfigError(f"ctc_tree_rows and {SCHEDULE} say the same thing twice; remove one of them.")
        if type(self.tree_rows) is not int or not 1 <= self.tree_rows <= MAX_TREE_ROWS:
            raise DrafterConfigError(f"ctc_tree_rows must be 1 to {MAX_TREE_ROWS}, not {shown(self.tree_rows)}.")

    def for_drafter(self, drafter: DrafterConfig, speculative: Mapping[str, Any]) -> "ServingOptions":
        """The same with the checkpoint's defaults, checked against it and vLLM's own options (DrafterConfigError)."""
        self.check_sources(drafter.vocab_size)
        draft = self.draft or ("tree" if drafter.tree_nodes or self.source_names != ("ctc",) else "chain")
        if draft not in DRAFTS:
            raise DrafterConfigError(f"ctc_draft must be one of {', '.join(DRAFTS)}, not {shown(draft)}.")
        if self.search not in SEARCHES[draft]:
            raise DrafterConfigError(
                f"ctc_search must be one of {', '.join(SEARCHES[draft])} with ctc_draft {draft!r}, "
                f"not {shown(self.search)}."
            )
        if self.search != "prefix" and drafter.lattice != "ctc":
            raise DrafterConfigError(
                f"ctc_search {self.search!r} collapses repeats and blanks, which this drafter's lattice "
                f"{drafter.lattice!r} does not have; use ctc_search 'prefix'."
            )
        if self.search == "argmax" and speculative.get("draft_sample_method") == "probabilistic":
            raise DrafterConfigError(
                "ctc_search 'argmax' has no proposal probabilities; use ctc_search 'prefix' with "
                "draft_sample_method 'probabilistic'."
            )
        if self.tree_rows is not None and SCHEDULE in speculative:
            raise DrafterConfigError(f"ctc_tree_rows and {SCHEDULE} say the same thing twice; remove one of them.")
        width = min(drafter.draft_vocab_size, MAX_CANDIDATES // drafter.num_frames)
        largest_values = (("tree_width", width), ("tree_depth", drafter.num_frames), ("tree_rows", MAX_TREE_ROWS))
        for name, largest in largest_values:
            value = getattr(self, name)
            if value is None:
                continue
            if draft == "chain":
                raise DrafterConfigError(f"ctc_{name} is an option of trees; remove it or set ctc_draft to 'tree'.")
            if type(value) is not int or not 1 <= value <= largest:  # a truth value is an int to isinstance
                raise DrafterConfigError(f"ctc_{name} must be 1 to {largest}, not {shown(value)}.")
        return dataclasses.replace(self, draft=draft, tree_depth=self.tree_depth or drafter.num_labels)

    def check_budget(self, budget: Any, drafter: DrafterConfig | None, is_data_parallel: bool = False) -> int:
        """`num_speculative_tokens`, or the default where it is None (DrafterConfigError). drafter: None without one.

        is_data_parallel: several engines serve the target, without a schedule of smaller trees.
        """
        if self.draft == "tree":
            default = (drafter and drafter.tree_nodes) or DEFAULT_TREE_NODES
            largest, what = MAX_NODES, "trees have 1 to {} nodes"
            if is_data_parallel and default > DATA_PARALLEL_TREE_NODES:
                default = DATA_PARALLEL_TREE_NODES
                if budget is None:
                    logger.info(
                        "Trees of %d nodes by default: with data parallelism vLLM verifies as many for large batches "
                        "as for small ones; set num_speculative_tokens for another number.",
                        default,
                    )
        else:
            assert drafter is not None, "chains are a drafter's"
            default, largest = drafter.num_labels, drafter.num_frames
            what = "this drafter's {0} frames hold 1 to {0} labels"
        if budget is None:
            return default
        if type(budget) is not int or not 1 <= budget <= largest:
            raise DrafterConfigError(
                f"num_speculative_tokens is {shown(budget)}, but {what.format(largest)}; choose a number in that range "
                f"or leave it out for {default}."
            )
        return budget


class Resolved(NamedTuple):
    """A user's `{"method": "ctc", ...}`, checked."""

    options: ServingOptions
    drafter: DrafterConfig | None  # None: no source reads one
    for_vllm: dict[str, Any]  # what vLLM's own method "dflash" understands; without drafter, "ngram_gpu"
    rule: AcceptanceRule
    plan: Plan | None = None  # that is followed


def parse(speculative: Mapping[str, Any], target: Any, parallel: Any = None) -> Resolved:
    """Everything that is wrong with the options or the drafter is found here, before weights load (DrafterConfigError).

    speculative: the keys of `--speculative-config` with underscores; left as it is. target: vLLM's ModelConfig of the
    served model. parallel: its ParallelConfig; None: one device.
    """
    given = ServingOptions.given_in(speculative)
    if "ctc" not in given.source_names:
        return _without_drafter(given, speculative, target, parallel)
    folder = find_drafter(speculative.get("model"), speculative.get("revision"), target.model)
    drafter = DrafterConfig.load(folder)
    drafter.check_target(target.get_hidden_size(), target.get_vocab_size(), target.get_total_num_hidden_layers())
    check_weights(folder, drafter, expected_shapes(drafter))
    contradicting = [key for key in IN_A_PLAN if speculative.get(key) is not None]
    plan = plan_to_follow(given.plan, contradicting, folder, target, parallel)
    if plan is not None:
        given = dataclasses.replace(given, **plan.options)
        speculative = {
            **speculative, "num_speculative_tokens": plan.num_speculative_tokens, SCHEDULE: plan.schedule,
        }  # fmt: skip
    options = given.for_drafter(drafter, speculative)
    for_vllm, rule = _for_vllm(options, drafter, speculative, target, parallel)
    for_vllm.setdefault(KEEP_LAST_BLOCK, True)
    for_vllm.update(method="dflash", model=str(folder))
    return Resolved(options, drafter, for_vllm, rule, plan)


def _without_drafter(given: ServingOptions, speculative: Mapping[str, Any], target: Any, parallel: Any) -> Resolved:
    """vLLM's method "ngram_gpu" drafts on the device, by Model Runner V2, and without a model of its own."""
    options = given.without_drafter(speculative, target.get_vocab_size())
    for_vllm, rule = _for_vllm(options, None, speculative, target, parallel)
    for_vllm.update(method="ngram_gpu")
    return Resolved(options, None, for_vllm, rule)


def _for_vllm(
    options: ServingOptions, drafter: DrafterConfig | None, speculative: Mapping[str, Any], target: Any, parallel: Any
) -> tuple[dict[str, Any], AcceptanceRule]:
    assert options.draft is not None, "the checked options have a kind of draft"
    is_data_parallel = parallel is not None and parallel.data_parallel_size > 1 and SCHEDULE not in speculative
    budget = options.check_budget(speculative.get("num_speculative_tokens"), drafter, is_data_parallel)
    limits.check_options(speculative, options.draft)
    for_vllm = {key: value for key, value in speculative.items() if not key.startswith(PREFIX)}
    if options.draft == "tree" and SCHEDULE not in speculative:
        rows, smallest = default_tree_rows(target)
        for_vllm[SCHEDULE] = tree_schedule(budget, options.tree_rows or rows, smallest)
    depth = min(budget, options.tree_depth or budget) if options.draft == "tree" else budget
    rule = choose_rule(speculative, Drafts(options.draft, depth, for_vllm.get(SCHEDULE)), target)
    return {**told_to_vllm(for_vllm, rule, options.draft), "num_speculative_tokens": budget}, rule


# Rows per step up to which verifying more of them brings more than it costs, and the smallest tree of a larger batch.
# CPU: measured with the tiny pair (benchmarks/results/latency_model.md), and with 135 M weights, whose rows are dear
# beside the drafter's forward. GPU: as many rows as cost nothing; where the device does not say, those of an H200 in 16
# bits. Not measured yet.
TREE_ROWS = {"cuda": (206, SMALLEST_TREE), "cpu": (36, SMALLEST_TREE), "cpu, large target": (11, 3)}


def default_tree_rows(target: Any) -> tuple[int, int]:
    """Rows and smallest tree for this device and target, vLLM's ModelConfig: a first guess. A plan is measured."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return TREE_ROWS["cpu, large target" if is_large(target.model) else "cpu"]
    rows, smallest = TREE_ROWS["cuda"]
    return free_rows(target) or rows, smallest


def smaller_trees(num_nodes: int, smallest: int = SMALLEST_TREE) -> list[int]:
    """What larger batches may get instead of `num_nodes`, largest first. One node less is worth no CUDA graphs."""
    return [size for size in TREE_SIZES if smallest <= size < num_nodes - 1]


def tree_schedule(num_nodes: int, rows: int, smallest: int = SMALLEST_TREE) -> list[tuple[int, int, int]]:
    """Value of vLLM's option SCHEDULE: (first batch size, last, nodes).

    The anchors and nodes of a batch are at most `rows`. A request alone gets the tree that was asked for, whatever its
    rows; batches beyond the last tree of `smallest` nodes or more get none. The first K rows of a tree are the best
    tree of K nodes.
    """
    schedule, first = [], 1
    for nodes in (num_nodes, *smaller_trees(num_nodes, smallest)):
        last = max(rows // (1 + nodes), 1)
        if last >= first:
            schedule.append((first, last, nodes))
            first = last + 1
    return [*schedule, (first, MAX_TREE_ROWS, 0)]
