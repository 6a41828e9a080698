"""The rule of acceptance that `--speculative-config` asks for, by vLLM's own keys or by ours, and what vLLM is told.

vLLM 0.33 knows FLy, for chains. Trees, and chains on 0.32, follow our rule (`accept/fly.py`), which is the same one.
Pivots are ours alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ctc_spec.accept.pivot import Pivot
from vllm_ctc_spec.accept.pivot_file import Pivots
from vllm_ctc_spec.accept.rule import AcceptanceRule, make_rule
from vllm_ctc_spec.drafter.weights import served_fingerprint
from vllm_ctc_spec.errors import DrafterConfigError, shown

logger = logging.getLogger("vllm.ctc_spec")

METHOD, FLY = "rejection_sample_method", "fly"
WINDOW, THRESHOLD, TOP_K = FLY_KEYS = ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k")
RULE, PIVOT = "ctc_acceptance", "pivot"
PIVOTS, PIVOT_THRESHOLD = PIVOT_KEYS = ("ctc_pivots", "ctc_pivot_threshold")
DEFAULT_PIVOT_THRESHOLD = 0.3  # the stricter one of the paper's
LONGEST_DEFAULT_WINDOW = 6  # vLLM's: min(6, num_speculative_tokens - 1)
# vLLM's own bounds (vllm/config/speculative.py, 0.33): what a value must be, in words and as a test.
BOUNDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    WINDOW: ("a whole number, 1 or more", lambda value: type(value) is int and value >= 1),
    THRESHOLD: ("a number of nats, 0 or more", lambda value: type(value) in (int, float) and value >= 0),
    TOP_K: ("a whole number, 1 or more", lambda value: type(value) is int and value >= 1),
}


class Drafts(NamedTuple):
    """What a rule has to know of the drafts that it judges."""

    kind: str  # "chain" or "tree"
    depth: int  # labels on the longest path of a draft
    schedule: Any  # vLLM's: (first batch size, last, tokens) ..; None: all batches draft alike. Not judged yet


def choose_rule(speculative: Mapping[str, Any], drafts: Drafts, target: Any) -> AcceptanceRule:
    """The rule that is asked for; its settings are checked (DrafterConfigError). The exact rule is the default.

    target: vLLM's ModelConfig of the served model.
    """
    if speculative.get(RULE) is not None:
        return _pivots(speculative, target)
    for key in PIVOT_KEYS:
        if speculative.get(key) is not None:
            raise DrafterConfigError(f'{key} is a setting of "{RULE}": "{PIVOT}"; add that, or remove {key}.')
    given = {key: speculative[key] for key in FLY_KEYS if speculative.get(key) is not None}
    if speculative.get(METHOD) != FLY:
        for key in given:
            raise DrafterConfigError(f'{key} is a setting of "{METHOD}": "{FLY}"; add that, or remove {key}.')
        return make_rule("exact")
    for key, value in given.items():
        what, is_good = BOUNDS[key]
        if not is_good(value):
            raise DrafterConfigError(f"{key} must be {what}, not {shown(value)}.")
    if drafts.depth < 2:
        more = "num_speculative_tokens" if drafts.kind == "chain" else "num_speculative_tokens and ctc_tree_depth"
        raise DrafterConfigError(
            f'"{METHOD}": "{FLY}" judges a token by what is drafted after it, and drafts have one label here; set '
            f"{more} to 2 or more."
        )
    window = given.get(WINDOW, min(LONGEST_DEFAULT_WINDOW, drafts.depth - 1))
    _check_window(window, drafts)
    if drafts.kind == "chain" and not vllm_knows_fly() and speculative.get("draft_sample_method") == "probabilistic":
        raise DrafterConfigError(
            f'"{METHOD}": "{FLY}" of sampled drafts needs vLLM 0.33; set draft_sample_method to "greedy".'
        )
    settings = {key.removeprefix("fly_"): value for key, value in given.items() if key != WINDOW}
    return make_rule(FLY, window=window, **settings)


def _pivots(speculative: Mapping[str, Any], target: Any) -> Pivot:
    if speculative[RULE] != PIVOT:
        raise DrafterConfigError(
            f'{RULE} must be "{PIVOT}", not {shown(speculative[RULE])}; leave it out for exact acceptance, or for FLy '
            f'("{METHOD}": "{FLY}").'
        )
    if speculative.get(METHOD) not in (None, "standard"):
        raise DrafterConfigError(
            f'{RULE} "{PIVOT}" and {METHOD} {shown(speculative[METHOD])} are two rules of acceptance; remove one.'
        )
    if speculative.get("draft_sample_method") == "probabilistic":
        raise DrafterConfigError(f'{RULE} "{PIVOT}" needs drafts that are not sampled; remove draft_sample_method.')
    if speculative.get(PIVOTS) is None:
        raise DrafterConfigError(f'{RULE} "{PIVOT}" needs "{PIVOTS}", the folder that `vllm-ctc pivots` wrote.')
    threshold = DEFAULT_PIVOT_THRESHOLD if speculative.get(PIVOT_THRESHOLD) is None else speculative[PIVOT_THRESHOLD]
    if type(threshold) not in (int, float) or not 0 < threshold < 1:
        raise DrafterConfigError(f"{PIVOT_THRESHOLD} must be a number between 0 and 1, not {shown(threshold)}.")
    pivots = Pivots.load(speculative[PIVOTS])
    _check_target(pivots, target)
    return pivots.rule(float(threshold))


def _check_target(pivots: Pivots, target: Any) -> None:
    found, hidden_size = pivots.classifier.hidden_size, target.get_hidden_size()
    other = "train one for this target with `vllm-ctc pivots`"
    if found != hidden_size:
        raise DrafterConfigError(
            f"The classifier in {pivots.path} reads states of the hidden size {found}, and the target has "
            f"{hidden_size}; {other}."
        )
    if not Path(target.model).is_dir():
        raise DrafterConfigError(
            f"{PIVOTS} can be compared with a target in a folder only, and {target.model} is none; give its folder."
        )
    weights = served_fingerprint(target.model)
    if weights != pivots.target_weights:
        raise DrafterConfigError(
            f"The classifier in {pivots.path} was trained for another target (weights {pivots.target_weights}, not "
            f"{weights}); {other}."
        )


def _check_window(window: int, drafts: Drafts) -> None:
    """vLLM refuses a window that no chain can fill; the walk of a tree would only never use it."""
    if window >= drafts.depth:
        would_do = f"{WINDOW} {drafts.depth - 1} would do"
        if drafts.kind == "chain":
            raise DrafterConfigError(
                f"{WINDOW} is {window}, which drafts of {drafts.depth} labels never fill: {would_do}, or more "
                "num_speculative_tokens."
            )
        logger.warning(
            "%s is %d, which trees of depth %d never fill: nothing is accepted but the target's own tokens; %s, or a "
            "larger ctc_tree_depth.", WINDOW, window, drafts.depth, would_do,
        )  # fmt: skip
        return
    for first, _, tokens in _entries(drafts.schedule):
        depth = min(tokens, drafts.depth)
        if 0 < depth <= window:
            logger.warning(
                "%s is %d, which drafts of batches from %d requests on never fill, since they have %d tokens: %s.",
                WINDOW, window, first, tokens,
                f"{WINDOW} {depth - 1} would do" if depth > 1 else "no window would do",
            )  # fmt: skip
            return


def _entries(schedule: Any) -> list[Sequence[int]]:
    """The entries that can be read; vLLM judges the whole of it later."""
    entries = schedule if isinstance(schedule, list | tuple) else ()
    return [e for e in entries if isinstance(e, list | tuple) and len(e) == 3 and all(type(n) is int for n in e)]


def vllm_knows_fly() -> bool:
    from vllm.config import SpeculativeConfig

    return WINDOW in SpeculativeConfig.__dataclass_fields__


def told_to_vllm(speculative: Mapping[str, Any], rule: AcceptanceRule, kind: str) -> dict[str, Any]:
    """`speculative` with vLLM's own words for a rule that it applies itself, and without them for ours."""
    others = {key: value for key, value in speculative.items() if key not in FLY_KEYS}
    if rule.name != FLY:
        return others
    if kind == "tree" or not vllm_knows_fly():
        del others[METHOD]
        return others
    return {**others, WINDOW: rule.window, THRESHOLD: rule.entropy_threshold, TOP_K: rule.entropy_top_k}


def lossy_mark(rule: AcceptanceRule) -> str:
    """What the `system_fingerprint` of a lossy server's responses ends in."""
    return f"lossy-{rule.name}"


def is_ours(rule: AcceptanceRule, speculative_config: Any) -> bool:
    """Whether the rule is applied by our walk where chains are verified. speculative_config: vLLM's."""
    return not rule.exact and speculative_config.rejection_sample_method != rule.name
