"""A trained drafter as it lies in the repository: weights in bf16, served by default with trees of 5 nodes.

    python assets/chat/publish.py TRAINED OUTPUT
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

TREE_NODES = 5  # what pays on two cores; more were measured while it learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder that `vllm-ctc train` wrote")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    weights = load_file(args.trained / "model.safetensors")
    halved = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    save_file(halved, args.output / "model.safetensors")
    shutil.copy(args.trained / "train_config.json", args.output / "train_config.json")
    config = json.loads((args.trained / "config.json").read_text())
    text = json.dumps({**config, "tree_nodes": TREE_NODES}, indent=2) + "\n"
    (args.output / "config.json").write_text(text)
    for file in args.output.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
