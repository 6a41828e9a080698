"""The drafter's configuration: round trip, and one sentence for everything that it refuses."""

import json
from types import SimpleNamespace

import pytest

from vllm_ctc_spec.drafter.config import DrafterConfig, default_aux_layer_ids, positions_of
from vllm_ctc_spec.errors import DrafterConfigError

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


@pytest.mark.parametrize("tree_nodes", [-1, 65])
def test_default_trees_that_no_word_holds_are_refused(tree_nodes):
    with pytest.raises(DrafterConfigError, match="tree_nodes must be 0"):
        DrafterConfig(**SMALL, tree_nodes=tree_nodes)


@pytest.mark.parametrize(
    ("rope", "at_most", "positions"),
    [
        (None, 1e30, 64),
        ({"rope_type": "default"}, 1e30, 64),
        ({"rope_type": "linear", "factor": 4.0}, 1e30, 256),
        ({"rope_type": "linear", "factor": 4.0}, 32, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 1e30, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 1e30, 64),
        ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}, 48, 48),
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 1e30, 16),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 1e30, 64),
    ],
)
def test_positions_of_a_target(rope, at_most, positions):
    """Scaling for each kind of layer, as in Gemma 3, is in its `max_position_embeddings` already."""
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    assert positions_of(config, at_most) == positions
