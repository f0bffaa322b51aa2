#!/usr/bin/env bash
# Show, submit or run a training job. Sourced by launch/pretrain_*.sh, which call
#
#   run_job RECIPE TEACHER DISK_GIB [--dry-run] [sbatch options] [-- training arguments]
#
# Outside Slurm it submits itself; inside, it checks the nodes, trains, and then ends or requeues.
# It is bash because the host may have Python only in a container.

LET_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
# Exit codes for `sacct`; otherwise a rank's exit code is passed on.
readonly EXIT_USAGE=2 EXIT_BAD_NODE=3 EXIT_NO_PROGRESS=4 EXIT_RESTARTS=5 EXIT_STOPPED=6

# shellcheck source=launch/lib/site.sh
. "$LET_ROOT/launch/lib/site.sh"
# shellcheck source=launch/lib/step.sh
. "$LET_ROOT/launch/lib/step.sh"
# shellcheck source=launch/lib/attempt.sh
. "$LET_ROOT/launch/lib/attempt.sh"
# shellcheck source=launch/lib/nodes.sh
. "$LET_ROOT/launch/lib/nodes.sh"
# shellcheck source=launch/lib/ending.sh
. "$LET_ROOT/launch/lib/ending.sh"

run_job() {
    local teacher="$2" disk="$3"
    RECIPE="$LET_ROOT/$1" DRY_RUN="" SBATCH_OPTIONS=() TRAINING_ARGUMENTS=()
    shift 3
    _read_arguments "$@"
    load_site "$teacher"
    export LET_DISK_GIB="${LET_DISK_GIB:-$disk}"
    _name_run
    if [[ -n $DRY_RUN ]]; then
        _show
    elif [[ -z ${SLURM_JOB_ID:-} ]]; then
        exec sbatch "${SBATCH_OPTIONS[@]}" "$0" -- "${TRAINING_ARGUMENTS[@]}"
    else
        _run
    fi
}

say() {
    printf 'launch: %s\n' "$*"
}

# Print what a command of Slurm prints. It is repeated for five minutes while the controller does not
# answer, and once if it does.
ask_slurm() {
    local seconds
    for seconds in 5 10 20 40 80 145; do
        "$@" && return
        ((seconds == 5)) || ! scontrol ping | grep -q " UP" || return 1
        say "$1 $2 failed: again in $seconds s" >&2
        sleep "$seconds"
    done
    "$@"
}

# Exit with code $1 and the message.
end() {
    local code="$1"
    shift
    say "$*" >&2
    exit "$code"
}

_read_arguments() {
    while (($#)); do
        case "$1" in
        --dry-run) DRY_RUN=1 ;;
        --)
            shift
            TRAINING_ARGUMENTS=("$@")
            [[ " $* " != *" --skip-train "* ]] ||
                end "$EXIT_USAGE" "error: --skip-train evaluates once, and a job here is requeued" \
                    "until its run is done: evaluate by megatron_let.pretrain in a job of your own"
            break
            ;;
        *) SBATCH_OPTIONS+=("$1") ;;
        esac
        shift
    done
    if [[ -n ${SLURM_JOB_ID:-} && ${#SBATCH_OPTIONS[@]} != 0 && -z $DRY_RUN ]]; then
        end "$EXIT_USAGE" "error: ${SBATCH_OPTIONS[0]} is after the script: give sbatch options" \
            "before it and training arguments after --"
    fi
}

# The job's name is the run's name; `singleton` allows one job per name at a time.
_name_run() {
    local index option
    RUN="${SLURM_JOB_NAME:-$(sed -n 's/^#SBATCH --job-name=//p' "$0")}"
    for index in "${!SBATCH_OPTIONS[@]}"; do
        option="${SBATCH_OPTIONS[index]}"
        case "$option" in
        --job-name=*) RUN="${option#*=}" ;;
        --job-name | -J) RUN="${SBATCH_OPTIONS[index + 1]:-}" ;;
        esac
    done
    export OUTPUT="$LET_RUNS/$RUN"
    CHECKPOINTS="$OUTPUT/checkpoints"
}

_show() {
    compose_step --kill-on-bad-exit=1
    compose_training ""
    echo "# job: sbatch${SBATCH_OPTIONS[*]:+ ${SBATCH_OPTIONS[*]}} $0, with the header"
    sed -n '/^#SBATCH/p' "$0"
    env | sed -n '/^SBATCH_/s/^/# from the site file or the environment: /p' | sort
    echo "# run folder: $OUTPUT"
    echo "# one task per node, or one per GPU with --ntasks-per-node=$LET_RANKS_PER_NODE:"
    quoted "${STEP[@]}" ranks "${TRAINING[@]}"
    echo "# which runs on each node (a job adds --exit-duration-in-mins from its time limit):"
    LET_SHOW=1 bash "$LET_ROOT/launch/lib/node.sh" ranks "${TRAINING[@]}"
}

_run() {
    local code=0
    refuse_finished
    begin_attempt
    set_rendezvous
    [[ ${LET_PREFLIGHT:-on} == off ]] || check_nodes
    compose_step --kill-on-bad-exit=1
    compose_training "$(exit_minutes)"
    begin_step training
    # A run that neither the signal nor the duration has ended must still reach the requeue.
    timeout --kill-after=15 "$(seconds_left 60)" "${STEP[@]}" ranks "${TRAINING[@]}" || code=$?
    finish_attempt "$code"
}
