#!/usr/bin/env bash
# Reproduces this folder's drafter:
#
#     assets/chat/build.sh [gsm8k_train.jsonl] [FOLDER]
#
# The file holds one {"question": ..., "answer": ...} a line (the training part of GSM8K, MIT licence); only questions are
# read. The drafter appears in FOLDER/drafter (default build/chat), beside prompts, responses, checkpoints and logs. Started
# again after an interruption, every step continues. How long each takes: docs/training.md.
set -euo pipefail
maths=${1:+$(realpath "$1")}
folder=$(realpath -m "${2:-build/chat}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
bin=$root/.venv/bin
mkdir -p "$folder"
target=$("$bin/python" "$root/benchmarks/pair.py" chat)
cd "$folder"
ln -sfn "$target" SmolLM2-135M-Instruct # so that the drafter's configuration names its target so
target=SmolLM2-135M-Instruct
export HF_HUB_OFFLINE=1

if [ ! -f prompts.jsonl ]; then
    "$bin/python" "$root/assets/chat/build_prompts.py" --target "$target" --output prompts.jsonl ${maths:+--maths "$maths"}
fi
"$bin/vllm-ctc" data --target "$target" --prompts prompts.jsonl --output dataset --max-new-tokens 192
"$bin/vllm-ctc" train --target "$target" --data dataset --output trained --lattice transitions --num-frames 8 \
    --num-labels 6 --draft-vocab-size 8192 --tree-nodes 8 --dtype bf16 --batch-size 8 --anchors 96 --steps 600 \
    --eval-every 300
# Half the size: vLLM casts weights to the dtype that it serves in anyway.
"$bin/python" - <<'PYTHON'
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

Path("drafter").mkdir(exist_ok=True)
weights = load_file("trained/model.safetensors")
save_file({name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}, "drafter/model.safetensors")
shutil.copy("trained/train_config.json", "drafter/train_config.json")
config = json.loads(Path("trained/config.json").read_text())
config["tree_nodes"] = 5  # what pays on two cores; more were measured while it learned
Path("drafter/config.json").write_text(json.dumps(config, indent=2) + "\n")
PYTHON
