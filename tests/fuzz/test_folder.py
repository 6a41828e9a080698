"""Hostile folders and options: other files beside the drafter's, links, special files, no permission."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ctc_spec.drafter.config import CONFIG_NAME, WEIGHTS_NAME
from vllm_ctc_spec.serving.options import ServingOptions

NOBODY = 65534


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def outside(folder: Path, name: str) -> Path:
    """The file, moved to where a link of a model hub's cache would point."""
    store = folder.parent / "blobs"
    store.mkdir(exist_ok=True)
    return Path(shutil.move(folder / name, store / name))


def link(folder: Path, name: str) -> None:
    (folder / name).symlink_to(outside(folder, name))


def index(folder: Path, name: str, file: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"fc.weight": file}}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights are a folder": (lambda f: replace(f / WEIGHTS_NAME, Path.mkdir), "has no model.safetensors"),
    "weights are a pipe": (lambda f: replace(f / WEIGHTS_NAME, os.mkfifo), "has no model.safetensors"),
    "weights are a device": (
        lambda f: replace(f / WEIGHTS_NAME, lambda p: p.symlink_to("/dev/zero")),
        "has no model.safetensors",
    ),
    "weights are a dangling link": (
        lambda f: replace(f / WEIGHTS_NAME, lambda p: p.symlink_to(f / "nowhere")),
        "has no model.safetensors",
    ),
    "weights are a link to themselves": (
        lambda f: replace(f / WEIGHTS_NAME, lambda p: p.symlink_to(p)),
        "has no model.safetensors",
    ),
    "weights are a link to another file": (
        lambda f: replace(f / WEIGHTS_NAME, lambda p: p.symlink_to("/etc/passwd")),
        "are damaged",
    ),
    "weights are a pickle": (
        lambda f: replace(f / WEIGHTS_NAME, lambda p: shutil.copy(f / "pytorch_model.bin", p)),
        "are damaged",
    ),
    "only a pickle": (lambda f: (f / WEIGHTS_NAME).unlink(), "has no model.safetensors"),
    "configuration is a folder": (lambda f: replace(f / CONFIG_NAME, Path.mkdir), "config.json is missing"),
    "configuration is a pipe": (lambda f: replace(f / CONFIG_NAME, os.mkfifo), "config.json is missing"),
    "configuration is a link to itself": (
        lambda f: replace(f / CONFIG_NAME, lambda p: p.symlink_to(p)),
        "config.json is missing",
    ),
    "more weights": (lambda f: shutil.copy(f / WEIGHTS_NAME, f / "model-00002.safetensors"), "which vLLM would read"),
    "weights that vLLM prefers": (
        lambda f: shutil.copy(f / WEIGHTS_NAME, f / "consolidated.safetensors"),
        "which vLLM would read",
    ),
    "an index": (lambda f: index(f, "model.safetensors.index.json", WEIGHTS_NAME), "which vLLM would read"),
    "an index that points outside": (
        lambda f: index(f, "model.safetensors.index.json", "../../../etc/passwd"),
        "which vLLM would read",
    ),
    "a quantisation": (lambda f: (f / "hf_quant_config.json").write_text("{}"), "which vLLM would read"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_it_is_refused(case, checkpoints):
    change, says = REFUSED[case]
    with checkpoints.copy() as folder:
        change(folder)
        assert says in checkpoints.refusal(folder)


@pytest.mark.parametrize("names", [(CONFIG_NAME,), (WEIGHTS_NAME,), (CONFIG_NAME, WEIGHTS_NAME)])
def test_links_of_a_model_hubs_cache_are_followed(names, checkpoints):
    with checkpoints.copy() as folder:
        for name in names:
            link(folder, name)
        assert checkpoints.refusal(folder) is None


@contextmanager
def without_privileges(*folders: Path) -> Iterator[None]:
    """As root, who may read everything, become somebody who may only pass through the folders above."""
    if os.geteuid() != 0:
        yield
        return
    above = [parent for folder in folders for parent in folder.parents if parent.stat().st_uid == 0]
    modes = {parent: parent.stat().st_mode for parent in above}
    for parent in modes:
        parent.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


@pytest.mark.parametrize("name", ["", CONFIG_NAME, WEIGHTS_NAME])
def test_files_without_permission(name, checkpoints):
    with checkpoints.copy() as folder:
        path = folder / name
        path.chmod(0)
        with without_privileges(folder):
            text = checkpoints.refusal(folder)
        path.chmod(0o700)
        assert "Permission denied" in text


@pytest.mark.parametrize("model", [5, 0.5, True, [], ["a"], {"a": 1}, "", "\0", "a\0b", "x" * 300, "../" * 99])
def test_a_model_that_is_no_name(model, checkpoints):
    assert checkpoints.refusal(model) is not None


OPTION_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.sampled_from(["tree", "chain", "prefix", 3]),
)  # fmt: skip
OPTIONS = [
    *(f"ctc_{name}" for name in ServingOptions.__dataclass_fields__),
    "num_speculative_tokens",
    "ctc_",
    "ctc_\n. X",
]


def test_any_option(checkpoints, examples):
    @examples(150)
    @given(st.dictionaries(st.sampled_from(OPTIONS), OPTION_VALUES, min_size=1, max_size=3))
    @example({"ctc_draft": ["tree"]})
    @example({"ctc_search": {}})
    @example({"ctc_draft": "tree", "num_speculative_tokens": 10**30})
    def holds(options):
        checkpoints.refusal(checkpoints.sound, **options)

    holds()
