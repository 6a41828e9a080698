"""Hostile `model.safetensors`: damaged, of other shapes or types, with values that are not numbers."""

import json
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save

from vllm_ctc_spec.drafter import module, weights
from vllm_ctc_spec.drafter.config import WEIGHTS_NAME
from vllm_ctc_spec.drafter.weights import MAX_HEADER_BYTES
from vllm_ctc_spec.errors import DrafterConfigError

from .checkpoints import CONFIG, Checkpoints

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@pytest.fixture(scope="module")
def tensors(checkpoints) -> dict[str, torch.Tensor]:
    return load(checkpoints.weights)


def refusal(checkpoints: Checkpoints, content: bytes) -> str | None:
    with checkpoints.copy() as folder:
        (folder / WEIGHTS_NAME).write_bytes(content)
        return checkpoints.refusal(folder)


def header_size(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_cut_anywhere(checkpoints, examples):
    whole = checkpoints.weights
    header, size = header_size(whole), len(whole)
    places = st.one_of(st.integers(0, 8), st.integers(8, header), st.integers(header, size - 1))

    @examples(60)
    @given(places)
    @example(0)
    @example(7)
    @example(8)
    @example(header)
    @example(size - 1)
    def holds(length):
        assert "are damaged" in refusal(checkpoints, whole[:length])

    holds()


@pytest.mark.parametrize("length", [0, 1, 7, 2**20, 100 * 2**20 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_false_length_of_the_header(length, checkpoints):
    assert "are damaged" in refusal(checkpoints, struct.pack("<Q", length) + checkpoints.weights[8:])


def test_bytes_behind_the_end(checkpoints):
    assert "are damaged" in refusal(checkpoints, checkpoints.weights + b"\0")


def test_any_bytes_of_the_header(checkpoints, examples):
    whole = checkpoints.weights
    header = header_size(whole)

    @examples(100)
    @given(st.binary(min_size=1, max_size=12), st.integers(0, header - 1))
    def holds(written, at):
        written = written[: header - at]
        changed = whole[:at] + written + whole[at + len(written) :]
        if refusal(checkpoints, changed) is None:
            assert changed[header:] == whole[header:] and load(changed).keys() == load(whole).keys()

    holds()


def test_any_bytes_of_the_data(checkpoints, examples):
    """Every float is a weight, and what is no finite number is refused."""
    whole = checkpoints.weights
    header = header_size(whole)
    words = (len(whole) - header) // 4

    @examples(100)
    @given(st.binary(min_size=4, max_size=4), st.integers(0, words - 1))
    @example(struct.pack("<f", float("nan")), words - 1)
    @example(struct.pack("<f", float("-inf")), 0)
    def holds(word, at):
        start = header + 4 * at
        text = refusal(checkpoints, whole[:start] + word + whole[start + 4 :])
        if torch.tensor(struct.unpack("<f", word)).isfinite():
            assert text is None
        else:
            assert "holds infinities or values that are not numbers" in text

    holds()


def test_a_header_of_anything(checkpoints, examples):
    """Offsets that overlap, lie outside or are no numbers; shapes that overflow; names with line breaks."""
    header = header_size(checkpoints.weights)
    fields = json.loads(checkpoints.weights[8:header])
    numbers = st.sampled_from([-1, 0, 1, 4, 2**31, 2**63, 2**64, 1.5, "1", None])
    entry = st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "", None, 3]),
        "shape": st.one_of(numbers, st.lists(numbers, max_size=4)),
        "data_offsets": st.one_of(numbers, st.lists(numbers, max_size=3)),
    })  # fmt: skip

    @examples(60)
    @given(
        st.one_of(st.sampled_from(sorted(fields)), st.sampled_from(["a\nb", "", "__metadata__", "x" * 10_000])), entry
    )
    @example("x" * 10_000, {"dtype": "F32", "shape": [], "data_offsets": [1, 1]})  # safetensors names the tensor
    def holds(name, value):
        text = json.dumps({**fields, name: value}).encode()
        content = struct.pack("<Q", len(text)) + text + checkpoints.weights[header:]
        is_metadata = name == "__metadata__"  # of which the format allows any strings
        assert refusal(checkpoints, content) is not None or is_metadata or value == fields.get(name)

    holds()


def test_tensors_that_do_not_fit(checkpoints, tensors, examples):
    @examples(60)
    @given(st.sampled_from(sorted(tensors)), st.sampled_from(["missing", "renamed", "flat", "longer", "empty", "more"]))
    def holds(name, change):
        changed = dict(tensors)
        weight = changed.pop(name)
        if change == "renamed":
            changed[f"{name}\n. X"] = weight
        elif change == "flat":
            changed[name] = weight.reshape(1, -1)
        elif change == "longer":
            changed[name] = torch.cat([weight, weight])
        elif change == "empty":
            changed[name] = weight[:0]
        elif change == "more":
            changed |= {name: weight, f"{name}.more": weight.clone()}
        fits = change == "flat" and changed[name].shape == weight.shape
        text = refusal(checkpoints, save({key: value.contiguous() for key, value in changed.items()}))
        assert text is None if fits else "do not fit its configuration" in text

    holds()


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_types_of_numbers(dtype, checkpoints, tensors):
    changed = {**tensors, "fc.weight": tensors["fc.weight"].to(dtype)}
    text = refusal(checkpoints, save(changed))
    assert text is None if dtype in FLOATS else "have the wrong type: fc.weight is" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_numbers_in_every_tensor(dtype, value, checkpoints, tensors):
    for name, weight in tensors.items():
        broken = weight.to(dtype).clone()
        broken.view(-1)[-1] = value
        text = refusal(checkpoints, save({**tensors, name: broken}))
        assert f"{name} holds infinities or values that are not numbers" in text


def empty_tensors(count: int) -> bytes:
    """A file of nothing else."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{i}": entry for i in range(count)}).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_header_of_many_tensors_is_read_in_bounded_time(checkpoints):
    """As many as it may have: refused by name, and the sentence stays short."""
    content = empty_tensors(14_000)
    assert 0.8 * MAX_HEADER_BYTES < len(content) < MAX_HEADER_BYTES
    assert "do not fit its configuration" in refusal(checkpoints, content)


@pytest.mark.parametrize("kind", ["tensors", "spaces", "metadata"])
def test_a_larger_header_is_not_read(kind, checkpoints, monkeypatch):
    """safetensors allows 100 MB, also of what it then ignores."""
    size = header_size(checkpoints.weights)
    fields, data = json.loads(checkpoints.weights[8:size]), checkpoints.weights[size:]
    metadata = {"__metadata__": {"a": "b" * MAX_HEADER_BYTES}}
    text = json.dumps({**metadata, **fields} if kind == "metadata" else fields).encode()
    if kind == "spaces":
        text += b" " * MAX_HEADER_BYTES
    content = empty_tensors(20_000) if kind == "tensors" else struct.pack("<Q", len(text)) + text + data
    monkeypatch.setattr(weights, "safe_open", None)
    assert "are damaged (a header of" in refusal(checkpoints, content)


@pytest.mark.parametrize("kind", ["behind the end", "a tensor"])
def test_a_huge_file_is_not_opened(kind, checkpoints, monkeypatch):
    """It has holes, so that it takes no room on the disk; a sound header may claim all of it."""
    header = header_size(checkpoints.weights)
    fields = json.loads(checkpoints.weights[8:header])
    if kind == "a tensor":
        fields = {"fc.weight": {"dtype": "F32", "shape": [2**36], "data_offsets": [0, 2**38]}}
    text = json.dumps(fields).encode()
    monkeypatch.setattr(weights, "safe_open", None)
    with checkpoints.copy() as folder, (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**38)
        assert f"are damaged (a file of {8 + len(text) + 2**38} bytes" in checkpoints.refusal(folder)


def test_weights_that_are_larger_than_the_memory(checkpoints, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("unable to mmap 51573648891 bytes from file <w>:\nCannot allocate memory (12)")

    monkeypatch.setattr(weights, "safe_open", full)
    text = checkpoints.refusal(checkpoints.sound)
    assert "cannot be mapped into memory (unable to mmap 51573648891 bytes" in text and "more memory" in text


def test_weights_to_start_a_training_from_are_checked_too(checkpoints):
    with checkpoints.copy() as folder:
        (folder / WEIGHTS_NAME).write_bytes(checkpoints.weights[:-1])
        with pytest.raises(DrafterConfigError, match="are damaged"):
            module.CTCDrafter(CONFIG, *checkpoints.tables).start_from(folder)


def test_the_weights_are_those_of_the_configuration(tensors):
    assert tensors["frame_queries"].shape == (CONFIG.num_frames, CONFIG.hidden_size)
