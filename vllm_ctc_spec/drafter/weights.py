"""What a drafter's weights file must be, judged before anything large is loaded; and what tells weights apart."""

import hashlib
import math
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open

from vllm_ctc_spec.drafter.config import WEIGHTS_NAME, DrafterConfig
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.errors import DrafterConfigError, shown

FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors calls them
VOCABULARY_TENSORS = {"d2t": "I64", "t2d": "BOOL"}
MAX_NUMBER_BYTES = 8  # of the largest of them
MAX_HEADER_BYTES = 2**20  # of a weights file; a real one has at most a tenth


def check_weights(folder: str | Path, config: DrafterConfig, expected: dict[str, list[int]]) -> None:
    """Refuse weights that are not this configuration's: names, shapes, types, numbers (DrafterConfigError).

    expected: the shape of every tensor, `module.expected_shapes`.

    It runs before anything large is loaded. Names and shapes come from the file's header, so a file that does not fit
    is refused before its values are read. Values are read once, out of the file's pages. Sizes come first: reading a
    header of a hundred megabytes, as large as safetensors allows, takes many seconds and a gigabyte.
    """
    path = Path(folder) / WEIGHTS_NAME
    _refuse_other_weights(path)
    try:
        _refuse_other_sizes(path, sum(map(math.prod, expected.values())))
        with safe_open(path, framework="pt") as file:
            given = {name: file.get_slice(name) for name in file.keys()}
            _refuse_other_shapes(path, expected, {name: weight.get_shape() for name, weight in given.items()})
            if config.has_draft_vocabulary:
                _refuse_broken_vocabulary(path, config, file)
            for name in given.keys() - VOCABULARY_TENSORS.keys():
                _refuse_broken_numbers(path, name, given[name].get_dtype(), file)
    except (SafetensorError, OSError) as error:
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} are damaged ({shorten(str(error), 300)}); "
            "train it again or restore the file."
        ) from error
    except RuntimeError as error:  # torch raises it for a file that is larger than the memory
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} cannot be mapped into memory ({shorten(str(error), 300)}); "
            "use a machine with more memory, or restore the drafter if it should be smaller."
        ) from error


def _refuse_other_weights(path: Path) -> None:
    """vLLM would load other files too, or in place of ours, or take ours for quantised (its default_loader.py)."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "hf_quant_config.json")
    others = sorted(file.name for pattern in patterns for file in path.parent.glob(pattern) if file.name != path.name)
    if others:
        raise DrafterConfigError(
            f"The CTC drafter at {path.parent} has {shown(others[0])} beside {path.name}, which vLLM would read too; "
            "move it to another folder."
        )


def _refuse_other_sizes(path: Path, numbers: int) -> None:
    size, most = path.stat().st_size, numbers * MAX_NUMBER_BYTES + MAX_HEADER_BYTES
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    for what, given, allowed in (("header", header, MAX_HEADER_BYTES), ("file", size, most)):
        if given > allowed:
            raise DrafterConfigError(
                f"The CTC drafter's weights {path} are damaged (a {what} of {given} bytes, where this configuration "
                f"needs {allowed} at most); train it again or restore the file."
            )


def _refuse_other_shapes(path: Path, expected: dict[str, list[int]], given: dict[str, list[int]]) -> None:
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise DrafterConfigError(
                f"The CTC drafter's weights {path} do not fit its configuration: "
                f"{name if name in expected else shown(name)} is "
                f"{shown(given[name]) if name in given else 'missing'}, expected {expected.get(name, 'none')}; "
                "train it again or restore the file."
            )


def _refuse_broken_vocabulary(path: Path, config: DrafterConfig, file: safe_open) -> None:
    """vLLM would gather rows of the target's head by these numbers."""
    for name, dtype in VOCABULARY_TENSORS.items():
        if file.get_slice(name).get_dtype() != dtype:
            raise DrafterConfigError(
                f"The CTC drafter's weights {path} have the wrong type: {name} is {file.get_slice(name).get_dtype()}, "
                f"expected {dtype}; train it again or restore the file."
            )
    d2t = file.get_tensor("d2t")
    token_ids = d2t + torch.arange(len(d2t))
    # The first two come first: an offset that overflows would come back into the range.
    outside = (d2t < 0) | (d2t > config.vocab_size) | (token_ids >= config.vocab_size)
    if outside.any():
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} do not fit the target: d2t points outside of its {config.vocab_size} "
            f"tokens at label {int(outside.nonzero()[0])}; train it again or restore the file."
        )
    if not (d2t.diff() >= 0).all() or not torch.equal(
        DraftVocabulary.of(token_ids, config.vocab_size).t2d, file.get_tensor("t2d")
    ):
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} are broken: d2t and t2d do not name the same tokens in order; "
            "train it again or restore the file."
        )


def _refuse_broken_numbers(path: Path, name: str, dtype: str, file: safe_open) -> None:
    if dtype not in FLOATS:
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} have the wrong type: {name} is {dtype}, expected one of "
            f"{', '.join(FLOATS)}; train it again or restore the file."
        )
    lowest, highest = file.get_tensor(name).aminmax()  # NaN comes out of it, and nothing is copied
    if not (lowest.isfinite() and highest.isfinite()):
        raise DrafterConfigError(
            f"The CTC drafter's weights {path} are broken: {name} holds infinities or values that are not numbers; "
            "train it again or restore the file."
        )


def served_fingerprint(folder: str | Path) -> str:
    """`weights_fingerprint` of what is to be served (DrafterConfigError)."""
    try:
        return weights_fingerprint(folder)
    except (SafetensorError, OSError) as error:
        raise DrafterConfigError(f"The weights in {folder} cannot be read ({error}); restore them.") from error


def weights_fingerprint(folder: str | Path) -> str:
    """Tells models apart, retrained ones in the same folder too: the first values of every parameter in its files."""
    digest = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                values = file.get_slice(name)
                first = values[:1] if values.get_shape() else file.get_tensor(name)
                digest.update(name.encode() + first.flatten()[:64].float().numpy().tobytes())
    for path in () if paths else sorted(Path(folder).glob("*.bin")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
