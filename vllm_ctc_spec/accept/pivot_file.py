"""The folder of `vllm-ctc pivots`: `pivots.safetensors`, the classifier's parts by name, and `pivots.json`, the target
that it was trained for and what was measured of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_ctc_spec.accept.pivot import Classifier, Pivot
from vllm_ctc_spec.errors import DrafterConfigError, path_given, shown

WEIGHTS_NAME, JSON_NAME = "pivots.safetensors", "pivots.json"
MAX_UNITS = 1024  # of a classifier; ours have fewer


class Pivots(NamedTuple):
    """What serving needs of the folder."""

    path: Path
    classifier: Classifier
    target_weights: str  # the target's `weights_fingerprint`
    min_probability: float
    digest: str

    @classmethod
    def load(cls, path: Any) -> "Pivots":
        """The folder that `save` wrote (DrafterConfigError)."""
        folder = path_given("ctc_pivots", path, "the folder that `vllm-ctc pivots` wrote")
        try:
            record = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
            weights, floor = record["target_weights"], record["min_probability"]
            digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
            with safe_open(folder / WEIGHTS_NAME, "pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DrafterConfigError(
                f"{folder} is no folder of `vllm-ctc pivots` ({type(error).__name__}); give the one that it wrote."
            ) from error
        if problem := _problem(parts, weights, floor):
            raise DrafterConfigError(f"{folder} {problem}; write it again with `vllm-ctc pivots`.")
        return cls(folder, Classifier(**parts), weights, floor, digest)

    def rule(self, threshold: float) -> Pivot:
        return Pivot(threshold, self.min_probability, self.digest, self.classifier)


def save(weights: Path, classifier: Classifier) -> None:
    save_file({name: part.contiguous() for name, part in classifier._asdict().items()}, weights)


def _problem(parts: dict[str, torch.Tensor], weights: Any, floor: Any) -> str | None:
    """What is wrong with a folder's content, to go on with in a sentence."""
    if parts.keys() != set(Classifier._fields):
        return f"holds the tensors {shown(sorted(parts))}, not {list(Classifier._fields)}"
    (units, *inputs), shapes = parts["hidden"].shape or (0,), [tuple(part.shape) for part in Classifier(**parts)]
    if len(inputs) != 1 or not 1 <= units <= MAX_UNITS or shapes[1:] != [(units,), (units,), ()]:
        return f"holds tensors of the shapes {shapes}, which make no classifier"
    if not all(part.dtype == torch.float32 and part.isfinite().all() for part in parts.values()):
        return "holds tensors that are not finite numbers in torch.float32"
    if not isinstance(weights, str) or type(floor) is not float or not 0 < floor < 1:
        return f"has a {JSON_NAME} with target_weights {shown(weights)} and min_probability {shown(floor)}"
    return None
