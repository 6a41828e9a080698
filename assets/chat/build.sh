#!/usr/bin/env bash
# Reproduces this folder's drafter:
#
#     assets/chat/build.sh gsm8k_train.jsonl [FOLDER]
#
# The file holds one {"question": ..., "answer": ...} a line (the training part of GSM8K, MIT licence); only questions are
# read. The drafter appears in FOLDER/drafter (default build/chat), beside prompts, responses, checkpoints and logs. Started
# again after an interruption, every step continues. How long each takes: docs/training.md.
#
# The target's answers are unpacked from answers.jsonl.xz. ANEW=1 lets the target invent prompts and answer them again.
set -euo pipefail
maths=$(realpath "${1:?the training part of GSM8K is missing: assets/chat/build.sh gsm8k_train.jsonl [FOLDER]}")
folder=$(realpath -m "${2:-build/chat}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
bin=$root/.venv/bin
mkdir -p "$folder"
target=$("$bin/python" "$root/benchmarks/pair.py" chat)
cd "$folder"
ln -sfn "$target" SmolLM2-135M-Instruct # so that the drafter's configuration names its target so
target=SmolLM2-135M-Instruct
export HF_HUB_OFFLINE=1

if [ -z "${ANEW:-}" ]; then
    "$bin/python" "$root/assets/chat/answers.py" unpack --target "$target" --folder . --maths "$maths"
else
    [ -f prompts.jsonl ] ||
        "$bin/python" "$root/assets/chat/build_prompts.py" --target "$target" --output prompts.jsonl --maths "$maths"
    "$bin/vllm-ctc" data --target "$target" --prompts prompts.jsonl --output dataset --max-new-tokens 192
fi
# Two runs: the second began when the first had shown that more steps pay.
train() {
    "$bin/vllm-ctc" train --target "$target" --data dataset --lattice transitions --num-frames 8 --num-labels 6 \
        --draft-vocab-size 8192 --tree-nodes 8 --dtype bf16 --batch-size 8 "$@"
}
train --output first --anchors 96 --steps 600 --eval-every 300
train --output second --init first --anchors 128 --steps 560 --eval-every 280 --save-every 40 --lr 3e-3
# Half the size: vLLM casts weights to the dtype that it serves in anyway.
"$bin/python" "$root/assets/chat/publish.py" second drafter
