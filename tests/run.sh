#!/usr/bin/env bash
# Run all checks and tests, on a fresh machine too: bash tests/run.sh [--fast] [pytest arguments]
#   --fast  ruff and the quick unit tests: one to two minutes once the environment exists
#   MEGATRON_LM=DIR  with the Megatron of this checkout of Megatron-LM instead of pip's
set -euo pipefail

# Twice what the whole suite takes on two busy cores, without the install.
LIMIT_SECONDS=4500

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib/environment.sh
. launch/lib/environment.sh

fast=""
[[ ${1:-} != --fast ]] || {
    fast=1
    shift
}

SECONDS=0
if [[ -n $fast ]]; then
    ensure_environment dev
else
    bash tests/launch/install_slurm.sh </dev/null &
    slurm_pid=$!
    # DeepSpeed is built from source. If its build fails, its tests are skipped.
    ensure_environment dev evaluation deepspeed || {
        echo "DeepSpeed could not be installed: tests of --engine deepspeed are skipped"
        ensure_environment dev evaluation
    }
    wait "$slurm_pid"
    # In the background, because most of it is a download: one training test on the oldest torch.
    # tests/distributed/test_oldest_torch.py waits for its exit code.
    OLDEST_TORCH="$(mktemp -d)"
    export OLDEST_TORCH
    oldest_torch() {
        local code=0
        timeout 1500 bash tests/oldest_torch.sh \
            "tests/distributed/test_layout_matrix.py::test_layout_matches_one_process[tp2-sp]" \
            >"$OLDEST_TORCH/log" 2>&1 </dev/null || code=$?
        echo "$code" >"$OLDEST_TORCH/code"
        return "$code"
    }
    oldest_torch &
    oldest_pid=$!
fi
echo "environment: ${SECONDS} s"
SECONDS=0
PATH="$(dirname -- "$LET_PYTHON"):$PATH"
if [[ -n ${MEGATRON_LM:-} ]]; then
    PYTHONPATH="$(bash tests/megatron_checkout.sh "$MEGATRON_LM" "$LET_PYTHON")"
    export PYTHONPATH
    trap 'rm -rf -- "$PYTHONPATH"' EXIT
fi
# One thread per process: several processes share two cores.
export OMP_NUM_THREADS=1

failed=()
phase() {
    local name="$1" start="$SECONDS" result=passed
    shift
    "$@" || {
        result=FAILED
        failed+=("$name")
    }
    echo "$name: $result in $((SECONDS - start)) s"
}

phase ruff ruff check .
if [[ -z $fast ]]; then
    phase mypy mypy megatron_let tools
    phase shellcheck shellcheck --external-sources \
        launch/*.sh launch/*/*.sh tests/*.sh tests/*/*.sh tools/*/*.sh .ci/run
    arguments=(--durations=15)
else
    arguments=(-m "not slow and not medium" tests/unit)
fi
echo "before pytest: ${#failed[@]} checks failed${failed[*]:+ (${failed[*]})}"

# Three files at a time: a test that starts ranks or waits for Slurm leaves a core idle. The files
# keep the order of tests/conftest.py, the longest first.
# pytest comes last because its closing line is read as the result. It writes that line on SIGINT;
# in a terminal Ctrl-C must reach it too.
foreground=()
[[ ! -t 0 ]] || foreground=(--foreground)
timeout "${foreground[@]}" --signal=INT --kill-after=60 "$((LIMIT_SECONDS - SECONDS))" \
    python -m pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder \
    "${arguments[@]}" "$@" </dev/null ||
    failed+=(pytest)
# pytest has waited for it and printed its failure, unless it was given other tests.
[[ -n $fast ]] || wait "$oldest_pid" || failed+=("oldest torch")
[[ ${#failed[@]} == 0 ]]
