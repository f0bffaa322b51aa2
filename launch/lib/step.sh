#!/usr/bin/env bash
# How Slurm starts the ranks: srun, also in a container, the command, and the time limits.
# Sourced by job.sh.

# Slurm sends the signal before the time limit to every process of a step. Only a rank handles
# SIGURG; others ignore it, while SIGUSR1 would kill the checkpoint writer and torchrun.
readonly EXIT_SIGNAL=SIGURG

# Set STEP: the command that starts a task with these srun options, in the site's container if any;
# append to it what the task runs.
compose_step() {
    local models="$TEACHER" mounts
    # A hub id is not a path; its files are in the Hugging Face cache.
    [[ $TEACHER == /* || -e $TEACHER ]] || models="${HF_HOME:-$HOME/.cache/huggingface}"
    mounts="$LET_ROOT,$LET_RUNS,${DATA%/*},$models${LET_MOUNTS:+,$LET_MOUNTS}"
    # No binding: with one task per node srun would bind all its ranks to one core.
    STEP=(srun --export=ALL --cpu-bind=none --chdir="$LET_ROOT" "$@")
    case "${LET_CONTAINER:-}" in
    "") ;;
    pyxis)
        STEP+=(--container-image="$LET_IMAGE" --container-workdir="$LET_ROOT")
        STEP+=(--container-mounts="$(_each_onto_itself "$mounts")")
        ;;
    apptainer) STEP+=(apptainer exec --nv --pwd "$LET_ROOT" --bind "$mounts" "$LET_IMAGE") ;;
    *) end "$EXIT_USAGE" "error: LET_CONTAINER is '$LET_CONTAINER': it is pyxis, apptainer or empty" ;;
    esac
    STEP+=(bash "$LET_ROOT/launch/lib/node.sh")
}

# pyxis takes SOURCE:TARGET; keep mounts that already have a target.
_each_onto_itself() {
    local mount mounts=()
    IFS=, read -r -a mounts <<<"$1"
    for mount in "${mounts[@]}"; do
        [[ $mount == *:* ]] || mount="$mount:$mount"
        printf '%s,' "$mount"
    done | sed 's/,$//'
}

# Set TRAINING: the module and its arguments; $1 is --exit-duration-in-mins, or empty.
compose_training() {
    TRAINING=(megatron_let.pretrain --config "$RECIPE")
    TRAINING+=(--exit-signal-handler --exit-signal "$EXIT_SIGNAL")
    [[ -z $1 ]] || TRAINING+=(--exit-duration-in-mins "$1")
    TRAINING+=(--flight-recorder-dump-path "$OUTPUT/flight_recorder/rank_")
    TRAINING+=(--wandb-save-dir "$OUTPUT")
    _add_training_arguments
}

# Once the job has saved, it continues from there: what it was started from is left out.
_add_training_arguments() {
    local argument before=""
    if ! _has_saved; then
        TRAINING+=("${TRAINING_ARGUMENTS[@]}")
        return
    fi
    for argument in "${TRAINING_ARGUMENTS[@]}"; do
        case "$argument" in
        --load | --load=* | --ckpt-step | --ckpt-step=*) ;;
        --finetune) ;;
        # Without them a checkpoint of --no-save-* cannot be loaded.
        --no-load-optim | --no-load-rng)
            [[ " ${TRAINING_ARGUMENTS[*]} " != *" ${argument/load/save} "* ]] ||
                TRAINING+=("$argument")
            ;;
        *) [[ $before == --load || $before == --ckpt-step ]] || TRAINING+=("$argument") ;;
        esac
        before="$argument"
    done
}

# Whether the last checkpoint is another than when this job began.
_has_saved() {
    local start
    [[ -n ${SLURM_JOB_ID:-} && -r $OUTPUT/attempts.tsv ]] || return 1
    start="$(awk -F '\t' -v job="$SLURM_JOB_ID" '$2 == job { print $3; exit }' "$OUTPUT/attempts.tsv")"
    [[ -n $start && $start != "$(iteration)" ]]
}

quoted() {
    printf '%q ' "$@"
    echo
}

# Set the rendezvous of the ranks and their shift over the nodes.
set_rendezvous() {
    local hosts first
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # After Megatron requested another GPU, every rank runs on the next node.
    LET_NODE_SHIFT=0
    [[ ! -r $OUTPUT/node_shift ]] || read -r LET_NODE_SHIFT <"$OUTPUT/node_shift"
    LET_NODE_SHIFT=$((LET_NODE_SHIFT % ${#hosts[@]}))
    first="${hosts[(${#hosts[@]} - LET_NODE_SHIFT) % ${#hosts[@]}]}"
    # The address, because the name may not resolve on the other nodes.
    LET_MASTER_ADDR="$(ask_slurm scontrol show node "$first" |
        sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    # A different port per attempt, so that a used port fails only one.
    export LET_NODE_SHIFT LET_MASTER_ADDR
    export LET_MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * LET_ATTEMPT) % 10000))
}

# Print the seconds to the time limit minus $1; 0 (`timeout`: no limit) if there is none.
seconds_left() {
    local end
    end="$(ask_slurm scontrol show job -o "$SLURM_JOB_ID" |
        sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')"
    [[ $end == 20* ]] || { echo 0 && return; }
    end=$(($(date -d "$end" +%s) - $(date +%s) - $1))
    echo $((end > 0 ? end : 1))
}

# Print the minutes to five minutes before the limit; nothing without a limit or with less time.
exit_minutes() {
    local minutes
    minutes=$(($(seconds_left 300) / 60))
    ((minutes < 1)) || echo "$minutes"
}
