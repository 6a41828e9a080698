#!/usr/bin/env bash
# Install torch's CPU build, which PyPI does not carry: from the indexes pip is configured with (a mirror may have it),
# else from PyTorch's own index. Usage: install_torch_cpu.sh PIP VERSION
set -euo pipefail
pip=$1
requirement="torch==$2+cpu"
pytorch_index=https://download.pytorch.org/whl/cpu
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

if "$pip" install --no-deps --only-binary :all: "$requirement" 2>"$errors"; then
    exit 0
fi
echo "$requirement is not in pip's configured indexes; trying $pytorch_index"
# Few retries: an unreachable host should be reported in a minute, not in ten.
if "$pip" --retries 1 --timeout 30 install --no-deps --only-binary :all: \
        --index-url "$pytorch_index" "$requirement" 2>"$errors"; then
    exit 0
fi
grep -v '^WARNING: Retrying' "$errors" | tail -n 4 >&2
echo "error: $requirement could not be installed from pip's configured indexes or from $pytorch_index:" \
     "connect this machine to that address, or put the wheel in a folder and run with PIP_FIND_LINKS=FOLDER." >&2
exit 1
