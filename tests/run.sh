#!/usr/bin/env bash
# All checks and tests, on a fresh machine too: bash tests/run.sh [pytest arguments]
set -euo pipefail

# On two quiet cores the whole of it, the install apart, takes about half of this.
LIMIT_SECONDS=2700

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib/environment.sh
. launch/lib/environment.sh

SECONDS=0
# DeepSpeed comes as source; where its build fails, everything else is tested all the same.
ensure_environment dev evaluation deepspeed || {
    echo "DeepSpeed could not be installed: the tests of --engine deepspeed are left out"
    ensure_environment dev evaluation
}
bash tests/launch/install_slurm.sh
echo "environment: ${SECONDS} s"
SECONDS=0
PATH="$(dirname -- "$LET_PYTHON"):$PATH"
# One thread a process: the tests start several, and two cores are enough to share.
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

# mypy refuses a folder without Python files, shellcheck a pattern without matches.
shopt -s nullglob
typed=(megatron_let)
scripts=(tools/*.py tools/*/*.py)
[[ ${#scripts[@]} == 0 ]] || typed+=(tools)
shell_files=(launch/*.sh launch/*/*.sh tests/run.sh tests/*/*.sh .ci/run)

phase ruff ruff check .
phase mypy mypy "${typed[@]}"
phase shellcheck shellcheck --external-sources "${shell_files[@]}"
echo "before pytest: ${#failed[@]} of 3 checks failed${failed[*]:+ (${failed[*]})}"

# Two files at a time: a test that starts ranks leaves a core idle while they load.
# pytest comes last because its closing line is read as the result. SIGINT lets it write that line;
# in a terminal Ctrl-C has to reach it too.
foreground=()
[[ ! -t 0 ]] || foreground=(--foreground)
timeout "${foreground[@]}" --signal=INT --kill-after=60 "$((LIMIT_SECONDS - SECONDS))" \
    python -m pytest -q --durations=15 --numprocesses 2 --dist loadfile "$@" </dev/null || failed+=(pytest)
[[ ${#failed[@]} == 0 ]]
