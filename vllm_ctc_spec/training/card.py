"""`README.md` of a finished drafter, with the metadata that the model hub reads: the folder is a repository of it."""

import json
import re
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import vllm_ctc_spec
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.config import TrainConfig

CARD_NAME = "README.md"
MARK = "<!-- Written by `vllm-ctc train`, which replaces it as long as this line stands here. -->"
UNKNOWN_LICENSE = "unknown"
SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/[^/]+/?$")  # a folder of the hub's cache
TAGS = ["vllm", "speculative-decoding", "ctc", "draft-model"]


def base_model(config: TrainConfig) -> str:
    """The target's name on the hub: as given, as the hub's cache or the target's configuration has it, or else the name
    of its folder."""
    folder = Path(config.target)
    snapshot = SNAPSHOT.search(str(folder))
    named = [config.base_model, snapshot["name"].replace("--", "/", 1) if snapshot else ""]
    named += [_configuration(folder).get("_name_or_path") or "", folder.resolve().name]
    return next((name for name in named if _is_repository(name)), "")


def _configuration(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def license_of(config: TrainConfig) -> str:
    """As given; or the target's own, by its card: the drafter learned from what the target says."""
    if config.license:
        return config.license
    try:
        given = (metadata_load(Path(config.target) / CARD_NAME) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        given = None
    return given if isinstance(given, str) and given else UNKNOWN_LICENSE


def write_card(folder: Path, card: str) -> None:
    """Unless somebody has written another one there."""
    path = folder / CARD_NAME
    if not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        path.write_text(card, encoding="utf-8")


def card_text(
    config: TrainConfig, drafter: CTCDrafter, num_responses: int, temperature: float, held_out: Acceptance
) -> str:
    """num_responses, temperature: of the training data; held_out: with the drafts that it is served with."""
    target = base_model(config)
    metadata = ModelCardData(
        license=license_of(config),
        base_model=target or None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    speculative = json.dumps({"method": "ctc", "model": "THIS_REPOSITORY"})
    sampled = f"at temperature {temperature:g}" if temperature else "greedily"
    facts = {
        "architecture": _architecture(drafter),
        "shared with the target": "embedding and head, which are not in this repository",
        "data": f"{num_responses} responses of the target itself, {sampled}",
        "training": f"{config.steps} steps of {config.batch_size} sequences with up to {config.anchors} anchors each, "
        f"loss `{config.loss}`, seed {config.seed}; all settings are in `train_config.json`",
        "acceptance length": _measured(config, held_out),
        "versions": f"vllm_ctc_spec {vllm_ctc_spec.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
    }
    rows = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    return f"""---
{metadata.to_yaml()}
---
{MARK}

# CTC drafter for {target or "its target"}

It drafts several tokens in one parallel forward ([paper](https://arxiv.org/abs/2412.00061)). The target verifies them:
the output is exactly its own. With `vllm-ctc-spec` installed beside vLLM:

```
vllm serve {target or "TARGET"} --speculative-config '{speculative}'
```

| | |
|---|---|
{rows}
"""


def _architecture(drafter: CTCDrafter) -> str:
    shape, num_parameters = drafter.config, sum(weight.numel() for weight in drafter.parameters())
    parts = (
        f"`{shape.architecture}`, {shape.num_layers} layers, hidden size {shape.hidden_size}",
        f"reading the target's hidden states after layers {', '.join(map(str, shape.aux_hidden_state_layer_ids))}",
        f"{shape.num_frames} frames of the lattice `{shape.lattice}`",
        f"{shape.num_labels} labels",
        f"label-conditional head of rank {shape.markov_rank}",
        f"draft vocabulary of {shape.draft_vocab_size} of {shape.vocab_size} tokens",
        f"{num_parameters / 1e6:.3g} M parameters",
    )
    return "; ".join(parts)


def _measured(config: TrainConfig, held_out: Acceptance) -> str:
    drafts = f"trees of {config.tree_nodes} nodes" if config.tree_nodes else f"chains of {config.num_labels} labels"
    length = f"{held_out.length:.3f} ± {held_out.half_width:.3f} tokens a forward of the target"
    return f"{length}, greedy, with {drafts} (95 % interval over {len(held_out.steps)} held-out rows)"
