#!/usr/bin/env bash
# The demo's recipe on a larger scale, for a machine with a GPU: a target of about 100 M parameters, its drafter and the
# cross-entropy twin of it, measured offline.
#
#     benchmarks/larger_pair.sh TRAIN.jsonl TEST.jsonl [FOLDER]
#
# TRAIN holds {"question": ..., "answer": ...} rows, the more the better; TEST rows of prompts. Needs torch, transformers
# and this package, not vLLM. Everything lies in FOLDER (default build/larger) and continues there when it is started
# again; the figures go to RESULTS (default benchmarks/results) as larger-*.json. Sizes and lengths are variables:
#
#     HIDDEN=512 LAYERS=8 TARGET_STEPS=2000 DRAFTER_STEPS=2000 benchmarks/larger_pair.sh ...
set -euo pipefail
train=$(realpath "${1:?usage: benchmarks/larger_pair.sh TRAIN.jsonl TEST.jsonl [FOLDER]}")
test=$(realpath "${2:?usage: benchmarks/larger_pair.sh TRAIN.jsonl TEST.jsonl [FOLDER]}")
folder=$(realpath -m "${3:-build/larger}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
results=$(realpath -m "${RESULTS:-$root/benchmarks/results}")
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$folder" "$results"
cd "$folder" # so that the drafters' configurations name their target by a relative path
export HF_HUB_OFFLINE=1

ctc() { "$python" -c 'import sys; from vllm_ctc_spec.cli import main; sys.exit(main())' "$@"; }

if [ ! -f target/tokenizer_config.json ]; then
    "$python" "$root/assets/build_target.py" --text "$train" --output target --work work/target \
        --hidden-size "${HIDDEN:-768}" --layers "${LAYERS:-12}" --vocab-size "${VOCAB:-16384}" \
        --steps "${TARGET_STEPS:-4000}" --tokens-per-batch "${TOKENS_PER_BATCH:-32768}" --lr "${TARGET_LR:-1e-3}"
fi
shared=(--target target --data "$train" --labels work/labels --num-layers "${DRAFTER_LAYERS:-2}"
    --steps "${DRAFTER_STEPS:-4000}" --eval-every "${EVAL_EVERY:-1000}" --batch-size "${BATCH_SIZE:-32}"
    --anchors "${ANCHORS:-64}" --lr "${DRAFTER_LR:-2e-3}" --dtype "${DTYPE:-bf16}" --num-frames 24)
ctc train "${shared[@]}" --output drafter --lattice transitions
ctc train "${shared[@]}" --output ctc --lattice ctc
ctc train "${shared[@]}" --output twin --loss ce
for name in drafter ctc twin; do
    ctc eval --target target --drafter "$name" --data "$test" --num-prompts "${NUM_PROMPTS:-200}" \
        --dtype "${DTYPE:-bf16}" --json "$results/larger-$name.json" | tee "larger-$name.txt"
done
