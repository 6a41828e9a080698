"""Hostile `config.json`: whatever it holds, it is refused in one sentence or serves a drafter that can be used."""

import json
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vllm_ctc_spec.drafter.config import CONFIG_NAME, MAX_CONFIG_BYTES

from .checkpoints import CONFIG, Checkpoints

Path = tuple[str | int, ...]


def places(value: object, path: Path = ()) -> list[Path]:
    """Every field and element of a configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, item in items for inner in ((*path, key), *places(item, (*path, key)))]


PLACES = places(CONFIG.to_dict())
OPTIONAL = (
    "architecture", "architectures", "draft_vocab_size", "frame_attention", "lattice", "positional_rank",
    "target_dtype", "transition_rank", "tree_nodes",
)  # fmt: skip
OPTIONAL_INSIDE = (  # of these only what is named is read
    ("architectures",),
    ("speculators_config",),
    ("speculators_config", "proposal_methods", 0),
    ("transformer_layer_config",),
    ("transformer_layer_config", "rope_parameters"),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 5, 7, 64, 65, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, 5e-324, -0.0]),
    st.integers(),
    st.floats(),
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["12", "ctc", "slots", "transitions", "../../etc/passwd", "/dev/zero", "a\nb. C", "\ud800", "x" * 9999]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3), st.lists(inner, min_size=1, max_size=1)
    ),
    max_leaves=6,
)


def edited(config: dict, path: Path, change: Callable) -> dict:
    """A copy with `change(container, key)` done at `path`."""
    config = json.loads(json.dumps(config))
    container = config
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return config


def refusal(checkpoints: Checkpoints, content: str | bytes) -> str | None:
    with checkpoints.copy() as folder:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / CONFIG_NAME).write_bytes(data)
        return checkpoints.refusal(folder)


def test_the_sound_checkpoint_is_taken(checkpoints):
    with checkpoints.copy() as folder:
        assert checkpoints.refusal(folder) is None


def test_any_value_at_any_place(checkpoints, examples):
    @examples(250)
    @given(st.sampled_from(PLACES), VALUES)
    @example(("num_frames",), 10**9)
    @example(("num_frames",), 4.0)
    @example(("tree_nodes",), True)
    @example(("transformer_layer_config", "num_hidden_layers"), 10**9)
    @example(("transformer_layer_config", "intermediate_size"), 2**62)
    @example(("transformer_layer_config", "rope_parameters", "rope_theta"), float("inf"))
    @example(("transformer_layer_config", "rope_parameters", "rope_theta"), "10000")
    @example(("transformer_layer_config", "rms_norm_eps"), 10**400)
    @example(("aux_hidden_state_layer_ids",), [1.0, 2.0])
    @example(("aux_hidden_state_layer_ids",), {"1": 2})
    @example(("speculators_config", "verifier", "name_or_path"), ["a", {"list": 1}])
    def holds(path, value):
        raw = edited(checkpoints.config, path, lambda container, key: container.__setitem__(key, value))
        if refusal(checkpoints, json.dumps(raw)) is None:
            # Taken: a value of the same type as the sound one, nothing that Python merely compares as equal.
            sound = checkpoints.config
            for key in path:
                sound = sound[key]
            assert type(value) is type(sound) or {type(value), type(sound)} == {int, float}
            assert json.loads(json.dumps(value, allow_nan=False)) == value

    holds()


def test_any_field_missing(checkpoints):
    for path in PLACES:
        raw = edited(checkpoints.config, path, lambda container, key: container.__delitem__(key))
        text = refusal(checkpoints, json.dumps(raw))
        assert text is not None or path[-1] in OPTIONAL or path[:-1] in OPTIONAL_INSIDE, path


def test_any_field_added(checkpoints, examples):
    @examples(40)
    @given(WORDS, VALUES)
    def holds(name, value):
        assume(name not in checkpoints.config)
        assert refusal(checkpoints, json.dumps({**checkpoints.config, name: value})) is not None

    holds()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_map", {"AutoConfig": "configuration_ctc.CTCConfig", "AutoModel": "modeling_ctc.CTCModel"}),
        ("trust_remote_code", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("model_type", "llama"),
    ],
)
def test_fields_that_other_loaders_obey(name, value, checkpoints):
    assert f"unknown field '{name}'" in refusal(checkpoints, json.dumps({**checkpoints.config, name: value}))


def test_a_field_that_is_there_twice(checkpoints):
    whole = json.dumps(checkpoints.config)
    text = refusal(checkpoints, f'{whole[:-1]}, "num_frames": {CONFIG.num_frames}}}')
    assert "the field 'num_frames' stands there twice" in text


def test_any_bytes(checkpoints, examples):
    whole = json.dumps(checkpoints.config).encode()

    @examples(100)
    @given(st.binary(max_size=30), st.integers(0, len(whole)), st.integers(0, 30))
    def holds(inserted, at, removed):
        changed = whole[:at] + inserted + whole[at + removed :]
        if refusal(checkpoints, changed) is None:
            assert json.loads(changed).keys() <= checkpoints.config.keys()

    holds()


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_nesting_of_any_depth(opening, closing, depth, checkpoints):
    nested = opening * depth + "1" + closing * depth
    assert refusal(checkpoints, nested) is not None
    whole = json.dumps(checkpoints.config)
    assert refusal(checkpoints, f'{whole[:-1]}, "deep": {nested}}}') is not None
    assert refusal(checkpoints, whole.replace('"lattice": "ctc"', f'"lattice": {nested}')) is not None


@pytest.mark.parametrize("content", ["", "null", "3", '"ctc"', "[]", "{}", "NaN", "\ufeff{}", "1" * 10_000])
def test_what_is_no_configuration(content, checkpoints):
    assert refusal(checkpoints, content) is not None


def test_a_huge_file_is_not_read(checkpoints):
    with checkpoints.copy() as folder:
        with (folder / CONFIG_NAME).open("r+b") as file:
            file.truncate(100 * 2**20)
        assert f"more than {MAX_CONFIG_BYTES} bytes" in checkpoints.refusal(folder)
