"""The drafter's configuration: round trip, and one sentence for everything that it refuses."""

import json

import pytest

from vllm_ctc_spec.config import (
    MAX_CANDIDATES,
    TREE_SIZES,
    DrafterConfig,
    DrafterConfigError,
    ServingOptions,
    default_aux_layer_ids,
    default_tree_width,
    tree_schedule,
)

SMALL = dict(
    hidden_size=32, vocab_size=64, target_num_layers=4, aux_hidden_state_layer_ids=(1, 2, 3), num_frames=6,
    num_labels=4, markov_rank=8, num_attention_heads=2, num_key_value_heads=1, head_dim=16, target="some/target",
)  # fmt: skip


def write(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").write_bytes(b"")


def test_round_trip(tmp_path):
    config = DrafterConfig(**SMALL)
    write(tmp_path, config.to_dict())
    assert DrafterConfig.load(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames must be 1 to 64"),
        ({"num_labels": 7}, "6 frames hold 1 to 6 labels"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"aux_hidden_state_layer_ids": (2, 1)}, "increasing"),
        ({"aux_hidden_state_layer_ids": (1, 5)}, "1 to 4"),
        ({"hidden_size": 0}, "hidden_size must be 1 to 1048576, a whole number, not 0"),
    ],
)
def test_contradictory_shapes_are_refused(change, message):
    with pytest.raises(DrafterConfigError, match=message):
        DrafterConfig(**{**SMALL, **change})


def edit(raw, path, value):
    *parents, leaf = path
    for key in parents:
        raw = raw[key]
    raw[leaf] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("dropout",), 0.1, "unknown field 'dropout'"),
        (("transformer_layer_config", "sliding_window"), 8, "unknown field 'transformer_layer_config.sliding_window'"),
        (("transformer_layer_config", "model_type"), "llama", "contradicts"),
        (("architectures",), ["Other"], "contradicts"),
        (("speculators_model_type",), "eagle3", "not a CTC drafter"),
        (("speculators_config", "proposal_methods"), [], "lacks or garbles"),
        (("num_frames",), "six", "num_frames must be 1 to 64, a whole number, not 'six'"),
    ],
)
def test_unknown_and_contradictory_fields_are_refused(tmp_path, path, value, message):
    raw = DrafterConfig(**SMALL).to_dict()
    edit(raw, path, value)
    write(tmp_path, raw)
    with pytest.raises(DrafterConfigError, match=message):
        DrafterConfig.load(tmp_path)


def test_missing_files_and_broken_json_are_named(tmp_path):
    with pytest.raises(DrafterConfigError, match="No CTC drafter at"):
        DrafterConfig.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DrafterConfigError, match="not valid JSON"):
        DrafterConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DrafterConfig(**SMALL).to_dict()))
    with pytest.raises(DrafterConfigError, match="has no model.safetensors"):
        DrafterConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "what"),
    [((48, 64, 4), "hidden size 32"), ((32, 65, 4), "vocabulary size 64"), ((32, 64, 5), "number of layers 4")],
)
def test_another_target_is_refused(shape, what):
    config = DrafterConfig(**SMALL)
    config.check_target(32, 64, 4)
    with pytest.raises(DrafterConfigError, match=what):
        config.check_target(*shape)


@pytest.mark.parametrize(
    ("layers", "ids"), [(1, (1,)), (2, (1,)), (3, (1, 2)), (8, (1, 2, 4, 6, 7)), (32, (1, 8, 16, 24, 31))]
)
def test_default_aux_layers(layers, ids):
    assert default_aux_layer_ids(layers) == ids


def test_serving_options_take_their_own_keys():
    speculative = {"method": "ctc", "ctc_search": "argmax", "num_speculative_tokens": 3}
    assert ServingOptions.take_from(speculative) == ServingOptions(search="argmax")
    assert speculative == {"method": "ctc", "num_speculative_tokens": 3}


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
    options = dict(options)
    with pytest.raises(DrafterConfigError, match=message):
        ServingOptions.take_from(options).for_drafter(DrafterConfig(**SMALL), options)


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
        (0, TREE, "tree", 32),
    ],
)
def test_defaults_come_from_the_checkpoint(tree_nodes, given, draft, budget):
    drafter = DrafterConfig(**SMALL, tree_nodes=tree_nodes)
    options = ServingOptions.take_from(dict(given)).for_drafter(drafter, {})
    assert (options.draft, options.tree_depth, options.tree_width) == (draft, 4, None)
    assert options.check_budget(None, drafter) == budget


@pytest.mark.parametrize(("draft", "largest"), [("chain", 6), ("tree", 64)])
def test_budgets_are_checked(draft, largest):
    drafter = DrafterConfig(**SMALL)
    options = ServingOptions(draft=draft).for_drafter(drafter, {})
    assert [options.check_budget(n, drafter) for n in (1, largest)] == [1, largest]
    for budget in (0, largest + 1, True, "4", 2.0):
        with pytest.raises(DrafterConfigError, match=f"num_speculative_tokens is {budget!r}.*1 to {largest}"):
            options.check_budget(budget, drafter)


@pytest.mark.parametrize("tree_nodes", [-1, 65])
def test_default_trees_that_no_word_holds_are_refused(tree_nodes):
    with pytest.raises(DrafterConfigError, match="tree_nodes must be 0"):
        DrafterConfig(**SMALL, tree_nodes=tree_nodes)


@pytest.mark.parametrize(("nodes", "rows"), [(16, 36), (64, 256), (5, 7), (64, 10), (1, 1)])
def test_no_batch_verifies_more_rows_than_it_may_and_none_could_have_more(nodes, rows):
    schedule = tree_schedule(nodes, rows)
    by_batch = {batch: size for first, last, size in schedule for batch in range(first, min(last, 2 * rows) + 1)}
    assert list(by_batch) == list(range(1, 2 * rows + 1))
    assert by_batch.pop(1) == nodes  # what was asked for
    for batch, size in by_batch.items():
        allowed = [n for n in (*TREE_SIZES, nodes, 0) if n <= nodes and (n == 0 or batch * (1 + n) <= rows)]
        assert size == max(allowed)


def test_small_trees_have_more_candidates_than_nodes():
    assert [default_tree_width(nodes) for nodes in (1, 8, 16, 24, 32, 64)] == [32, 32, 32, 48, 64, 64]
