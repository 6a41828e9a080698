"""The options of `--speculative-config`: what they mean for a drafter, and one sentence for what is refused."""

import copy
import json
import logging
import shutil
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from vllm_ctc_spec.accept.fly import Fly
from vllm_ctc_spec.drafter.config import CONFIG_NAME, DrafterConfig
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving.acceptance import vllm_knows_fly
from vllm_ctc_spec.serving.options import (
    DEFAULT_TREE_NODES,
    KEEP_LAST_BLOCK,
    MAX_CANDIDATES,
    MAX_TREE_ROWS,
    SCHEDULE,
    TREE_ROWS,
    TREE_SIZES,
    ServingOptions,
    default_tree_rows,
    parse,
    tree_schedule,
)

SMALL = dict(
    hidden_size=32, vocab_size=64, target_num_layers=4, aux_hidden_state_layer_ids=(1,), num_frames=6, num_labels=4
)


ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def target() -> SimpleNamespace:
    """What is read of vLLM's ModelConfig."""
    drafter = DrafterConfig.load(ASSETS / "drafter")
    return SimpleNamespace(
        model=str(ASSETS / "target"), get_hidden_size=lambda: drafter.hidden_size,
        get_vocab_size=lambda: drafter.vocab_size, get_total_num_hidden_layers=lambda: drafter.target_num_layers,
    )  # fmt: skip


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_vllm_is_told_its_own_keys_and_the_given_ones_stay(target, draft):
    given = {
        "method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": draft, "num_speculative_tokens": 8,
        "draft_sample_method": "greedy",
    }  # fmt: skip
    before = copy.deepcopy(given)
    options, drafter, for_vllm, rule, _ = parse(MappingProxyType(given), target)
    assert given == before
    assert (options.draft, options.search) == (draft, "prefix") and drafter == DrafterConfig.load(ASSETS / "drafter")
    assert rule.exact
    schedule = for_vllm.pop(SCHEDULE, None)
    told = {key: value for key, value in given.items() if key != "ctc_draft"}
    assert for_vllm == {**told, "method": "dflash", KEEP_LAST_BLOCK: True}
    assert schedule == (tree_schedule(8, *default_tree_rows(target)) if draft == "tree" else None)


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_a_rule_is_resolved_with_its_window_for_these_drafts(target, draft):
    given = {"model": str(ASSETS / "drafter"), "ctc_draft": draft, "rejection_sample_method": "fly"}
    _, _, for_vllm, rule, _ = parse({**given, "num_speculative_tokens": 4}, target)
    assert rule == Fly(window=3)
    assert parse({**given, "num_speculative_tokens": 8}, target).rule == Fly(window=6)
    told = draft == "chain" and vllm_knows_fly()
    assert for_vllm.get("rejection_sample_method") == ("fly" if told else None)
    assert for_vllm.get("fly_window_size") == (3 if told else None)
    if draft == "tree":
        assert parse({**given, "num_speculative_tokens": 16, "ctc_tree_depth": 3}, target).rule == Fly(window=2)


def test_what_was_given_is_kept(target):
    given = {"model": str(ASSETS / "drafter"), "ctc_draft": "tree", SCHEDULE: [(1, 9, 3)], KEEP_LAST_BLOCK: False}
    for_vllm = parse(given, target).for_vllm
    assert for_vllm[SCHEDULE] == [(1, 9, 3)] and for_vllm[KEEP_LAST_BLOCK] is False


def test_serving_options_are_the_keys_with_their_prefix():
    speculative = {"method": "ctc", "ctc_search": "argmax", "num_speculative_tokens": 3}
    assert ServingOptions.given_in(speculative) == ServingOptions(search="argmax")


TREE = {"ctc_draft": "tree"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctc_serach": "prefix"}, "Unknown speculative option 'ctc_serach'"),
        ({"ctc_draft": "bush"}, "must be one of chain, tree"),
        ({"ctc_search": "beam"}, "must be one of prefix, argmax"),
        ({"ctc_search": "transform"}, "must be one of prefix, argmax"),
        ({**TREE, "ctc_search": "argmax"}, "must be one of prefix, transform"),
        ({"ctc_search": "argmax", "draft_sample_method": "probabilistic"}, "no proposal probabilities"),
        ({"ctc_tree_depth": 3}, "ctc_tree_depth is an option of trees"),
        ({**TREE, "ctc_tree_depth": 0}, "ctc_tree_depth must be 1 to 6"),
        ({**TREE, "ctc_tree_depth": 7}, "ctc_tree_depth must be 1 to 6"),
        ({**TREE, "ctc_tree_width": 65}, "ctc_tree_width must be 1 to 64"),
        ({**TREE, "ctc_tree_width": True}, "ctc_tree_width must be 1 to 64"),
        ({**TREE, "ctc_tree_rows": 0}, "ctc_tree_rows must be 1 to"),
        ({**TREE, "ctc_tree_rows": 9, "num_speculative_tokens_per_batch_size": [(1, 8, 4)]}, "the same thing twice"),
    ],
)
def test_serving_options_are_checked(options, message):
    with pytest.raises(DrafterConfigError, match=message):
        ServingOptions.given_in(options).for_drafter(DrafterConfig(**SMALL), options)


@pytest.mark.parametrize("lattice", [{"lattice": "slots"}, {"lattice": "transitions", "transition_rank": 4}])
@pytest.mark.parametrize(("draft", "search"), [("chain", "argmax"), ("tree", "transform")])
def test_lattices_without_blank_are_not_collapsed(lattice, draft, search):
    drafter, name = DrafterConfig(**SMALL, **lattice), lattice["lattice"]
    ServingOptions(draft=draft).for_drafter(drafter, {})
    with pytest.raises(DrafterConfigError, match=f"ctc_search {search!r} collapses.*lattice {name!r}.*use ctc_search"):
        ServingOptions(draft=draft, search=search).for_drafter(drafter, {})


def test_a_tree_has_no_more_candidates_than_a_gpu_program_holds():
    drafter = DrafterConfig(**{**SMALL, "vocab_size": 50_000})
    largest = MAX_CANDIDATES // drafter.num_frames
    ServingOptions(draft="tree", tree_width=largest).for_drafter(drafter, {})
    with pytest.raises(DrafterConfigError, match=f"ctc_tree_width must be 1 to {largest}"):
        ServingOptions(draft="tree", tree_width=largest + 1).for_drafter(drafter, {})


@pytest.mark.parametrize(
    ("tree_nodes", "given", "draft", "budget"),
    [
        (0, {}, "chain", 4),
        (24, {}, "tree", 24),
        (24, {"ctc_draft": "chain"}, "chain", 4),
        (0, TREE, "tree", 31),
    ],
)
def test_defaults_come_from_the_checkpoint(tree_nodes, given, draft, budget):
    drafter = DrafterConfig(**SMALL, tree_nodes=tree_nodes)
    options = ServingOptions.given_in(given).for_drafter(drafter, {})
    assert (options.draft, options.tree_depth, options.tree_width) == (draft, 4, None)
    assert options.check_budget(None, drafter) == budget


@pytest.mark.parametrize(
    ("tree_nodes", "options", "budget"),
    [
        (24, {}, 7),
        (5, {}, 5),
        (0, TREE, 7),
        (24, {"ctc_tree_rows": 64}, 7),
        (24, {"num_speculative_tokens": 24}, 24),
        (24, {SCHEDULE: [(1, 8, 24)]}, 24),
        (24, {"ctc_draft": "chain"}, 8),
    ],
)
def test_data_parallel_engines_draft_small_trees_by_default(
    target, tmp_path, caplog, monkeypatch, tree_nodes, options, budget
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    folder = shutil.copytree(ASSETS / "drafter", tmp_path / "drafter")
    described = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**described, "tree_nodes": tree_nodes}))
    caplog.set_level("INFO", "vllm.ctc_spec")
    resolved = parse({"model": str(folder), **options}, target, SimpleNamespace(data_parallel_size=2))
    assert resolved.for_vllm["num_speculative_tokens"] == budget
    said = {record.message.partition(":")[0] for record in caplog.records}
    assert said == ({"Trees of 7 nodes by default"} if budget == 7 else set())


@pytest.mark.parametrize(("draft", "largest"), [("chain", 6), ("tree", 64)])
def test_budgets_are_checked(draft, largest):
    drafter = DrafterConfig(**SMALL)
    options = ServingOptions(draft=draft).for_drafter(drafter, {})
    assert [options.check_budget(n, drafter) for n in (1, largest)] == [1, largest]
    for budget in (0, largest + 1, True, "4", 2.0):
        with pytest.raises(DrafterConfigError, match=f"num_speculative_tokens is {budget!r}.*1 to {largest}"):
            options.check_budget(budget, drafter)


@pytest.mark.parametrize("smallest", [7, 3])
@pytest.mark.parametrize(
    ("nodes", "rows"), [(16, 36), (64, 256), (32, 256), (31, 256), (8, 36), (5, 7), (64, 10), (1, 1), (5, 16)]
)
def test_no_batch_verifies_more_rows_than_it_may_and_none_could_have_more(nodes, rows, smallest):
    schedule = tree_schedule(nodes, rows, smallest)
    by_batch = {batch: size for first, last, size in schedule for batch in range(first, min(last, 2 * rows) + 1)}
    assert list(by_batch) == list(range(1, 2 * rows + 1))
    assert by_batch.pop(1) == nodes  # what was asked for
    for batch, size in by_batch.items():
        sizes = [n for n in TREE_SIZES if n >= smallest]
        allowed = [n for n in (*sizes, nodes, 0) if n in (nodes, 0) or n < nodes - 1]
        assert size == max(n for n in allowed if n == 0 or batch * (1 + n) <= rows)


@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [(64, [64, 31, 15, 7, 0]), (63, [63, 31, 15, 7, 0]), (32, [32, 15, 7, 0]), (16, [16, 7, 0]), (8, [8, 0])],
)
def test_a_tree_of_any_size_is_followed_by_trees_that_are_a_power_of_two_with_their_anchor(nodes, sizes):
    assert [size for _, _, size in tree_schedule(nodes, 256)] == sizes


def test_the_default_tree_fills_what_a_step_may_verify():
    """On a GPU; 256 rows for 8, 16 and 32 requests."""
    assert tree_schedule(DEFAULT_TREE_NODES, 256)[:3] == [(1, 8, 31), (9, 16, 15), (17, 32, 7)]


def test_three_requests_of_a_large_target_on_a_cpu_draft_nothing():
    """Their rows cost more there than they bring."""
    schedule = tree_schedule(5, *TREE_ROWS["cpu, large target"])
    assert schedule == [(1, 1, 5), (2, 2, 3), (3, MAX_TREE_ROWS, 0)]
