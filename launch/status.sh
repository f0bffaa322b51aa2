#!/usr/bin/env bash
# Show the state of a run, by its name or its folder: bash launch/status.sh RUN
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:?which run: its name under LET_RUNS, or its folder}"
site="${LET_SITE:-$root/launch/site.sh}"
if [[ ! -d $run && -r $site ]]; then
    # A user's file may read variables that are not set.
    set +o nounset
    # shellcheck source=launch/site.example.sh
    . "$site"
    set -o nounset
    run="$LET_RUNS/$run"
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${LET_PYTHON:-$root/.venv/bin/python}" \
    "$root/tools/run_status.py" "$run"
