#!/usr/bin/env bash
# How Slurm starts the ranks: srun or srun in a container, what it runs, and for how long.
# Sourced by job.sh.

# What Slurm sends before the time limit goes to every process of a step. Only a rank listens to
# SIGURG; all others ignore it, while SIGUSR1 would end the checkpoint writer and torchrun.
readonly EXIT_SIGNAL=SIGURG

# Fill STEP: how a task is started, with these options of srun, and in a container if the site names
# one; what it runs comes after it.
compose_step() {
    local mounts="$LET_ROOT,$LET_RUNS,${DATA%/*},$TEACHER${LET_MOUNTS:+,$LET_MOUNTS}"
    # Binding is left to the ranks: srun would put all of a node's ranks on one core.
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

# pyxis takes SOURCE:TARGET; a mount of the site that names a target already stays as it is.
_each_onto_itself() {
    local mount mounts=()
    IFS=, read -r -a mounts <<<"$1"
    for mount in "${mounts[@]}"; do
        [[ $mount == *:* ]] || mount="$mount:$mount"
        printf '%s,' "$mount"
    done | sed 's/,$//'
}

# Fill TRAINING: the module and its arguments; $1 is the second net in minutes, or empty.
compose_training() {
    TRAINING=(megatron_let.pretrain --config "$RECIPE")
    TRAINING+=(--exit-signal-handler --exit-signal "$EXIT_SIGNAL")
    [[ -z $1 ]] || TRAINING+=(--exit-duration-in-mins "$1")
    TRAINING+=(--flight-recorder-dump-path "$OUTPUT/flight_recorder/rank_")
    TRAINING+=(--wandb-save-dir "$OUTPUT" "${TRAINING_ARGUMENTS[@]}")
}

quoted() {
    printf '%q ' "$@"
    echo
}

# Where all ranks meet, and how far they are shifted over the nodes.
set_rendezvous() {
    local hosts first
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Megatron asks for another GPU to tell a broken one: every rank moves to the next node.
    LET_NODE_SHIFT=0
    [[ ! -r $OUTPUT/node_shift ]] || read -r LET_NODE_SHIFT <"$OUTPUT/node_shift"
    LET_NODE_SHIFT=$((LET_NODE_SHIFT % ${#hosts[@]}))
    first="${hosts[(${#hosts[@]} - LET_NODE_SHIFT) % ${#hosts[@]}]}"
    # The address and not the name, which need not resolve on the other nodes.
    LET_MASTER_ADDR="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    # Another one in each attempt, so that a port that is taken costs one of them.
    export LET_NODE_SHIFT LET_MASTER_ADDR
    export LET_MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * LET_ATTEMPT) % 10000))
}

# Seconds to the time limit, less $1; 0, which `timeout` takes for never, if there is none.
seconds_left() {
    local end
    end="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')"
    [[ $end == 20* ]] || { echo 0 && return; }
    end=$(($(date -d "$end" +%s) - $(date +%s) - $1))
    echo $((end > 0 ? end : 1))
}

# The second net, five minutes before the limit; empty where there is no limit or no such time.
exit_minutes() {
    local minutes
    minutes=$(($(seconds_left 300) / 60))
    ((minutes < 1)) || echo "$minutes"
}
