#!/usr/bin/env bash
# How a run stands: bash launch/status.sh RUN_FOLDER
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${LET_PYTHON:-$root/.venv/bin/python}" "$root/tools/run_status.py" "$@"
