#!/usr/bin/env bash
# A training job: shown, submitted or run. Sourced by launch/pretrain_*.sh, which call
#
#   run_job RECIPE TEACHER DISK_GIB [--dry-run] [sbatch options] [-- training arguments]
#
# Outside Slurm it submits itself; inside it checks the nodes, trains, and then ends or requeues.

LET_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
# What went wrong, for whoever reads `sacct`; a rank's own code is passed on otherwise.
readonly EXIT_USAGE=2 EXIT_BAD_NODE=3 EXIT_NO_PROGRESS=4 EXIT_RESTARTS=5 EXIT_STOPPED=6
# Megatron's exit codes after a result that it does not trust (core/rerun_state_machine.py).
readonly EXIT_RERUN_ELSEWHERE=16 EXIT_RESULT_INVALID=17
# What Slurm sends before the time limit goes to every process of a step. Only a rank listens to
# SIGURG; all others ignore it, while SIGUSR1 would end the checkpoint writer and torchrun.
readonly EXIT_SIGNAL=SIGURG

run_job() {
    local recipe="$1" teacher="$2" disk="$3"
    shift 3
    RECIPE="$LET_ROOT/$recipe" DRY_RUN="" SBATCH_OPTIONS=() TRAINING_ARGUMENTS=()
    _read_arguments "$@"
    _load_site "$teacher"
    export LET_DISK_GIB="${LET_DISK_GIB:-$disk}" PYTHONPATH="$LET_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    if [[ -n $DRY_RUN ]]; then
        _show
    elif [[ -z ${SLURM_JOB_ID:-} ]]; then
        exec sbatch "${SBATCH_OPTIONS[@]}" "$0" -- "${TRAINING_ARGUMENTS[@]}"
    else
        _run
    fi
}

_say() {
    printf 'launch: %s\n' "$*"
}

_end() {
    local code="$1"
    shift
    _say "$*" >&2
    exit "$code"
}

_read_arguments() {
    while (($#)); do
        case "$1" in
        --dry-run) DRY_RUN=1 ;;
        --)
            shift
            TRAINING_ARGUMENTS=("$@")
            return
            ;;
        *) SBATCH_OPTIONS+=("$1") ;;
        esac
        shift
    done
    if [[ -n ${SLURM_JOB_ID:-} && ${#SBATCH_OPTIONS[@]} != 0 && -z $DRY_RUN ]]; then
        _end "$EXIT_USAGE" "error: ${SBATCH_OPTIONS[0]} stands after the script: sbatch options go" \
            "before it, training arguments behind --"
    fi
}

_load_site() {
    local site="${LET_SITE:-$LET_ROOT/launch/site.sh}" name
    [[ -r $site ]] || _end "$EXIT_USAGE" "error: there is no site file $site:" \
        "copy launch/site.example.sh to launch/site.sh and fill it in, or set LET_SITE to yours"
    # shellcheck source=launch/site.example.sh
    . "$site"
    # The teacher's tokenizer serves the baseline too, so that the two can be compared.
    export TEACHER="${TEACHER:-${LET_MODELS:+$LET_MODELS/$1}}"
    export TOKENIZER="${TOKENIZER:-$TEACHER}"
    for name in LET_RUNS DATA TEACHER; do
        [[ -n ${!name:-} ]] || _end "$EXIT_USAGE" "error: $name is not set: set it in $site"
    done
    export DATA LET_PYTHON="${LET_PYTHON:-$LET_ROOT/.venv/bin/python}" LET_FABRIC="${LET_FABRIC:-}"
    [[ -r $LET_ROOT/launch/env/${LET_FABRIC:-none}.sh ]] ||
        _end "$EXIT_USAGE" "error: LET_FABRIC is '$LET_FABRIC': set it to the name of a file in" \
            "launch/env/, such as infiniband"
    [[ -n ${LET_CONTAINER:-} || -x $LET_PYTHON ]] ||
        _end "$EXIT_USAGE" "error: there is no Python at $LET_PYTHON: make it on a login node with" \
            "bash launch/lib/environment.sh, or set LET_PYTHON in $site"
    export LET_GPUS_PER_NODE="${LET_GPUS_PER_NODE:-8}"
    export LET_RANKS_PER_NODE="${LET_RANKS_PER_NODE:-$LET_GPUS_PER_NODE}"
    # The job's name is the run's name; singleton then allows one job of a name at a time.
    RUN="${SLURM_JOB_NAME:-$(_header job-name)}"
    [[ -z ${SLURM_JOB_ID:-} && -n $(_option job-name) ]] && RUN="$(_option job-name)"
    export OUTPUT="$LET_RUNS/$RUN"
    CHECKPOINTS="$OUTPUT/checkpoints"
}

# The value of an #SBATCH line of the script, or of an option on the command line.
_header() {
    sed -n "s/^#SBATCH --$1=//p" "$0"
}

_option() {
    local option
    for option in "${SBATCH_OPTIONS[@]}"; do
        [[ $option != --"$1"=* ]] || printf '%s\n' "${option#*=}"
    done
}

# --- What is run --------------------------------------------------------------------------------

# Fill STEP: how Slurm starts one task, in a container if the site names one.
_compose_step() {
    # Binding is left to the ranks: srun would put all of a node's ranks on one core.
    STEP=(srun --kill-on-bad-exit=1 --cpu-bind=none --chdir="$LET_ROOT")
    case "${LET_CONTAINER:-}" in
    "") ;;
    pyxis)
        STEP+=(--container-image="$LET_IMAGE" --container-workdir="$LET_ROOT")
        STEP+=(--container-mounts="$LET_ROOT,$LET_RUNS${LET_MOUNTS:+,$LET_MOUNTS}")
        ;;
    apptainer)
        STEP+=(apptainer exec --nv --pwd "$LET_ROOT")
        STEP+=(--bind "$LET_ROOT,$LET_RUNS${LET_MOUNTS:+,$LET_MOUNTS}" "$LET_IMAGE")
        ;;
    *) _end "$EXIT_USAGE" "error: LET_CONTAINER is '$LET_CONTAINER': it is pyxis, apptainer or empty" ;;
    esac
    STEP+=(bash "$LET_ROOT/launch/lib/node.sh")
}

# Fill TRAINING: the module and its arguments; $1 is the second net in minutes, or empty.
_compose_training() {
    TRAINING=(megatron_let.pretrain --config "$RECIPE")
    TRAINING+=(--exit-signal-handler --exit-signal "$EXIT_SIGNAL")
    [[ -z $1 ]] || TRAINING+=(--exit-duration-in-mins "$1")
    TRAINING+=(--flight-recorder-dump-path "$OUTPUT/flight_recorder/rank_")
    TRAINING+=("${TRAINING_ARGUMENTS[@]}")
}

_show() {
    _compose_step
    _compose_training ""
    echo "# job: sbatch${SBATCH_OPTIONS[*]:+ ${SBATCH_OPTIONS[*]}} $0, whose header is"
    sed -n '/^#SBATCH/p' "$0"
    env | sed -n '/^SBATCH_/s/^/# from the site file or the environment: /p' | sort
    echo "# run folder: $OUTPUT"
    echo "# one task a node, or a GPU with --ntasks-per-node=$LET_RANKS_PER_NODE:"
    _quoted "${STEP[@]}" "${TRAINING[@]}"
    echo "# which runs on each node (--exit-duration-in-mins is added from the time limit):"
    LET_SHOW=1 bash "$LET_ROOT/launch/lib/node.sh" "${TRAINING[@]}"
}

_quoted() {
    printf '%q ' "$@"
    echo
}

# --- The job ------------------------------------------------------------------------------------

_run() {
    local code=0
    _refuse_finished
    mkdir -p -- "$OUTPUT/logs" "$OUTPUT/attempts" "$OUTPUT/flight_recorder"
    _begin_attempt
    _stop_without_progress
    _set_rendezvous
    _compose_step
    [[ ${LET_PREFLIGHT:-on} == off ]] || _check_nodes
    _compose_training "$(_exit_minutes)"
    _quoted "${TRAINING[@]}" >"$ATTEMPT/command.txt"
    export LET_STEP_DIR="$ATTEMPT/training"
    mkdir -p -- "$LET_STEP_DIR/exits"
    # The last net: a run that neither signal nor duration ended still reaches the requeue below.
    timeout --kill-after=15 "$(_seconds_left 60)" "${STEP[@]}" "${TRAINING[@]}" || code=$?
    _decide "$code"
}

_refuse_finished() {
    if [[ -e $CHECKPOINTS/DONE ]]; then
        _say "run $RUN is done (iteration $(_iteration)); remove $CHECKPOINTS/DONE to train on"
        exit 0
    fi
    [[ ! -e $CHECKPOINTS/STOP ]] ||
        _end "$EXIT_STOPPED" "run $RUN was stopped by $CHECKPOINTS/STOP: remove that file to go on"
}

# The iteration of the last complete checkpoint; 0 for none.
_iteration() {
    local iteration=0
    [[ ! -r $CHECKPOINTS/latest_checkpointed_iteration.txt ]] ||
        read -r iteration <"$CHECKPOINTS/latest_checkpointed_iteration.txt" || true
    printf '%s\n' "$iteration"
}

# attempts.tsv: number, job, iteration at its start, time, nodes. Appended, as every log.
_begin_attempt() {
    local number=1
    [[ ! -r $OUTPUT/attempts.tsv ]] || number=$(($(wc -l <"$OUTPUT/attempts.tsv") + 1))
    ATTEMPT="$OUTPUT/attempts/$(printf '%04d' "$number")"
    mkdir -p -- "$ATTEMPT"
    printf '%s\t%s\t%s\t%s\t%s\n' "$number" "$SLURM_JOB_ID" "$(_iteration)" \
        "$(date +%s)" "$SLURM_JOB_NODELIST" >>"$OUTPUT/attempts.tsv"
    export LET_ATTEMPT="$number" LET_RECORD_DIR="$ATTEMPT"
    _say "run $RUN, attempt $number, job $SLURM_JOB_ID on $SLURM_JOB_NODELIST," \
        "from iteration $(_iteration); logs in $OUTPUT/logs"
    cp -- "$RECIPE" "$ATTEMPT/recipe.yaml"
    printf '%s\n' "$SLURM_JOB_NODELIST" >"$ATTEMPT/nodes.txt"
    git -C "$LET_ROOT" rev-parse HEAD >"$ATTEMPT/commit.txt" 2>/dev/null || true
    git -C "$LET_ROOT" diff HEAD >"$ATTEMPT/diff.patch" 2>/dev/null || true
}

# How many of this job's attempts, counted from the last, started where the run stands now.
_tries_without_progress() {
    awk -F '\t' -v job="$SLURM_JOB_ID" -v now="$(_iteration)" \
        '$2 == job { tries = $3 == now ? tries + 1 : 0 } END { print tries + 0 }' \
        "$OUTPUT/attempts.tsv"
}

# Before a start that Slurm itself made, after a node failure, as well as before a requeue.
_stop_without_progress() {
    # The attempt that is about to start is in the file already.
    (($(_tries_without_progress) <= 2)) || _end_without_progress
}

_end_without_progress() {
    _end "$EXIT_NO_PROGRESS" "error: run $RUN stands at iteration $(_iteration) after two tries:" \
        "not requeued; find the reason above or in $OUTPUT/logs, then submit again"
}

_set_rendezvous() {
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Megatron asks for another GPU to tell a broken one: every rank moves to the next node.
    export LET_NODE_SHIFT=0
    [[ ! -r $OUTPUT/node_shift ]] || read -r LET_NODE_SHIFT <"$OUTPUT/node_shift"
    LET_NODE_SHIFT=$((LET_NODE_SHIFT % ${#hosts[@]}))
    # The address and not the name, which need not resolve on the other nodes.
    local first="${hosts[(${#hosts[@]} - LET_NODE_SHIFT) % ${#hosts[@]}]}"
    LET_MASTER_ADDR="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    export LET_MASTER_ADDR LET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
}

# Seconds to the time limit, less $1; 0, which `timeout` takes for never, if there is none.
_seconds_left() {
    local end
    end="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')"
    [[ $end == 20* ]] || { echo 0 && return; }
    end=$(($(date -d "$end" +%s) - $(date +%s) - $1))
    echo $((end > 0 ? end : 1))
}

# The second net, five minutes before the limit; empty where there is no limit or no such time.
_exit_minutes() {
    local minutes
    minutes=$(($(_seconds_left 300) / 60))
    ((minutes < 1)) || echo "$minutes"
}

# --- Nodes --------------------------------------------------------------------------------------

_check_nodes() {
    local code=0 node bad="" verdicts="$ATTEMPT/preflight/nodes"
    export LET_STEP_DIR="$ATTEMPT/preflight"
    mkdir -p -- "$LET_STEP_DIR/exits" "$verdicts"
    timeout --kill-after=15 "${LET_PREFLIGHT_SECONDS:-300}" "${STEP[@]}" megatron_let.doctor.nodes \
        --output "$OUTPUT" --verdicts "$verdicts" || code=$?
    while IFS= read -r node; do
        if [[ ! -e $verdicts/$node ]]; then
            _say "node $node: it did not answer"
        elif [[ -s $verdicts/$node ]]; then
            sed "s/^/launch: node $node: /" "$verdicts/$node"
        else
            continue
        fi
        bad+="${bad:+,}$node"
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [[ -n $bad ]]; then
        _end "$EXIT_BAD_NODE" "error: nodes $bad are not fit to train: submit again with" \
            "--exclude=$bad, and have them looked at"
    elif ((code)); then
        _end "$EXIT_BAD_NODE" "error: the nodes are fit one by one but not together (code $code):" \
            "see $OUTPUT/logs for the all-reduce, check LET_FABRIC and the interface names"
    fi
}

# --- The end ------------------------------------------------------------------------------------

# Say what happened and end, or requeue; $1 is srun's exit code.
_decide() {
    local step_code="$1" code="$1" first rank="" node="" when=""
    if first="$(_first_failure)"; then
        read -r when code rank node <<<"$first"
        _show_failure "$when" "$code" "$rank" "$node"
    elif ((step_code)); then
        _say "no rank said how it ended; the step ended with code $step_code"
    fi
    _show_disk
    printf '%s\t%s\t%s\t%s\n' "$(date +%s)" "$code" "${rank:--}" "$(_iteration)" >"$ATTEMPT/result.tsv" || true
    if [[ -e $CHECKPOINTS/DONE ]]; then
        _show_wandb
        _say "run $RUN is done at iteration $(_iteration)"
        exit 0
    elif [[ -e $CHECKPOINTS/STOP ]]; then
        _say "run $RUN was stopped by $CHECKPOINTS/STOP at iteration $(_iteration)"
        exit 0
    fi
    case "$code" in
    "$EXIT_USAGE") _end "$code" "error: the run cannot start as it is asked for: not requeued" ;;
    "$EXIT_RESULT_INVALID")
        _end "$code" "error: Megatron found a result invalid (exit code 17): not requeued; its log" \
            "names the node and GPU, and a checkpoint from before is in $CHECKPOINTS"
        ;;
    "$EXIT_RERUN_ELSEWHERE")
        # Read by the next attempt: the suspicious rank must run on another GPU.
        echo $((LET_NODE_SHIFT + 1)) >"$OUTPUT/node_shift"
        _say "Megatron asks to run the last iteration again on another GPU (exit code 16)"
        ;;
    esac
    _requeue
}

_requeue() {
    (($(_tries_without_progress) < 2)) || _end_without_progress
    ((${SLURM_RESTART_COUNT:-0} < ${LET_MAX_RESTARTS:-50})) ||
        _end "$EXIT_RESTARTS" "error: run $RUN was requeued ${SLURM_RESTART_COUNT:-0} times" \
            "(LET_MAX_RESTARTS): not again; submit it again to go on"
    _say "requeueing run $RUN at iteration $(_iteration)"
    scontrol requeue "$SLURM_JOB_ID" ||
        _end 1 "error: this cluster does not requeue job $SLURM_JOB_ID: submit it again to go on"
    # Slurm ends this script now.
    sleep 120
}

# "time code rank node" of the rank that failed first; a rank that was told to end writes nothing.
_first_failure() {
    awk 'FNR == 1 && NF && $2 != 0 && (!time || $1 < time) { time = $1; line = $0 }
        END { if (!time) exit 1; print line }' "$LET_STEP_DIR"/exits/* 2>/dev/null
}

_show_failure() {
    local log
    log="$OUTPUT/logs/$(printf 'rank_%04d.log' "$3")"
    _say "rank $3 on node $4 failed first, with exit code $2 at $(date -d "@${1%.*}" +%T);" \
        "its last lines ($log):"
    # Only this attempt's: the log goes on from earlier ones.
    awk '/^==== attempt / { count = 0 } { line[count++ % 30] = $0 }
        END { for (i = count > 30 ? count - 30 : 0; i < count; i++) print "    " line[i % 30] }' "$log"
}

_show_disk() {
    local free
    free="$(df --output=avail -k -- "$OUTPUT" | tail -n 1)"
    ((free > 1048576)) || _say "error: the disk of $OUTPUT has $((free / 1024)) MiB left: free some;" \
        "the checkpoint of iteration $(_iteration) is complete"
}

_show_wandb() {
    if compgen -G "$OUTPUT/wandb/offline-run-*" >/dev/null; then
        _say "to send the offline log: wandb sync $OUTPUT/wandb/offline-run-*"
    fi
}
