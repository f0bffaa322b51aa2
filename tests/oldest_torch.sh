#!/usr/bin/env bash
# Train on the oldest torch that setup.py declares, and compile the kernels with its Triton.
#
#   bash tests/oldest_torch.sh [pytest arguments]
#
# tests/run.sh runs one test with it. torch from PyPI needs 7 GB with its CUDA libraries; it is
# installed in an environment of its own, which takes all other packages from the tested one.
# OLDEST_VENV  folder of that environment (default: .venv-oldest)
# TORCH_INDEX  another package index, such as https://download.pytorch.org/whl/cpu (1 GB)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib/environment.sh
. launch/lib/environment.sh

site_packages() {
    "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

ensure_environment dev
oldest="$(sed -nE 's/.*"torch>=([0-9.]+)".*/\1/p' setup.py)"
venv="${OLDEST_VENV:-$PWD/.venv-oldest}"
if [[ ! -x $venv/bin/python ]]; then
    "$LET_PYTHON" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    "torch==$oldest"
# After its own packages, so that its torch is found first.
site_packages "$LET_PYTHON" >"$(site_packages "$venv/bin/python")/tested_environment.pth"

"$venv/bin/python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
export PYTHONPATH="$PWD" OMP_NUM_THREADS=1
[[ $# -gt 0 ]] || set -- tests/distributed/test_cpu_host.py tests/unit/compat tests/unit/losses \
    tests/unit/teacher/test_attention.py
"$venv/bin/python" -m pytest -q "$@"
