#!/usr/bin/env bash
# Reproduces both models of this folder, the target and its drafter, from one text file:
#
#     assets/build.sh gsm8k_train.jsonl [WORK]
#
# The file holds one {"question": ..., "answer": ...} a line (the training part of GSM8K, MIT licence). WORK (default
# build/assets) keeps checkpoints, labels and logs: started again after an interruption, both trainings continue.
set -euo pipefail
text=$(realpath "${1:?usage: assets/build.sh FILE.jsonl [WORK]}")
work=${2:-build/assets}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
export HF_HUB_OFFLINE=1

if [ ! -f assets/target/config.json ]; then
    "$bin/python" assets/build_target.py --text "$text" --output assets/target --work "$work/target" --steps 1200
fi
"$bin/vllm-ctc" train --target assets/target --data "$text" --output assets/drafter --work "$work/drafter" "${@:3}"
