#!/usr/bin/env bash
# Train the same small model without and with a real teacher, on this machine, and compare.
#   bash launch/quickstart.sh [--steps N] [--output DIR] [--teacher DIR|FILE.gguf] [--text FILE...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/lib/environment.sh
. "$root/launch/lib/environment.sh"
ensure_environment
exec "$LET_PYTHON" "$root/tools/quickstart.py" "$@"
