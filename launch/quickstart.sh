#!/usr/bin/env bash
# Train a small model, then a larger one without and with it as the teacher, and compare.
#   bash launch/quickstart.sh [--teacher DIR|FILE.gguf|HUB_ID|smollm2] [--text FILE...] [--output DIR]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/lib/environment.sh
. "$root/launch/lib/environment.sh"
ensure_environment
exec "$LET_PYTHON" "$root/tools/quickstart.py" "$@"
