#!/usr/bin/env bash
# Reproduces both models of this folder, the target and its drafter, from one text file:
#
#     assets/build.sh gsm8k_train.jsonl [FOLDER]
#
# The file holds one {"question": ..., "answer": ...} a line (the training part of GSM8K, MIT licence). The models
# appear in FOLDER/assets (default build/assets), beside checkpoints, labels and logs: started again after an
# interruption, both trainings continue. About two hours on two CPU cores, and 3 GB for stored hidden states.
set -euo pipefail
text=$(realpath "${1:?usage: assets/build.sh FILE.jsonl [FOLDER]}")
folder=$(realpath -m "${2:-build}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
mkdir -p "$folder"
cd "$folder" # so that the drafter's configuration names its target as assets/target
export HF_HUB_OFFLINE=1

if [ ! -f assets/target/tokenizer_config.json ]; then
    "$root/.venv/bin/python" "$root/assets/build_target.py" --text "$text" --output assets/target \
        --work work/target --steps 1200
fi
"$root/.venv/bin/vllm-ctc" data --target assets/target --prompts "$text" --output dataset --dtype float32 --hidden-states
"$root/.venv/bin/vllm-ctc" train --target assets/target --data dataset --features stored --output assets/drafter \
    --work work/drafter --lattice transitions --num-frames 24 --num-layers 2 --tree-nodes 16 --dtype bf16 \
    --steps 1600 --eval-every 400 --batch-size 8 --anchors 24
