#!/usr/bin/env bash
# What starts the ranks of a node: torchrun, or ft_launcher, which restarts them within the job.
# Sourced by node.sh.

# Succeed if the ranks of module $1 are to be restarted within the job.
restarts_in_job() {
    [[ $1 == megatron_let.pretrain && ${LET_RESTARTS_IN_JOB:-0} != 0 ]]
}

# Print what prevents restarts within the job, or nothing.
restarts_problem() {
    if [[ ${SLURM_NTASKS:-} != "${SLURM_NNODES:-}" ]]; then
        echo "ft_launcher needs one task per node"
    elif [[ $("$LET_PYTHON" -m megatron_let.run.restarts_in_job 2>/dev/null) != yes ]]; then
        echo "$LET_PYTHON has no nvidia-resiliency-ext 0.6 or newer"
    fi
}

# Set launcher; $1: number of nodes, $2: this node's rank, $3 and $4: address and port of node 0.
# Static rendezvous, not c10d: rank 0 is on a known node, and an attempt can shift the ranks.
compose_torchrun() {
    launcher=("$LET_PYTHON" -m torch.distributed.run --nnodes "$1" --node-rank "$2"
        --nproc-per-node "$LET_RANKS_PER_NODE" --master-addr "$3" --master-port "$4" --no-python)
}

# Set launcher, with the same arguments.
compose_ft_launcher() {
    local step="${LET_HANG_SECONDS:-600}"
    # It orders the nodes by this variable, not by --node-rank.
    export CROSS_SLURM_PROCID="$2"
    launcher=("$LET_PYTHON" -m megatron_let.run.restarts_in_job --nnodes "$1" --node-rank "$2"
        --nproc-per-node "$LET_RANKS_PER_NODE" --rdzv-endpoint "$3:$4" --no-python)
    # The first node's name may not resolve on the others.
    [[ $2 != 0 ]] || launcher+=(--local-addr "$3")
    launcher+=(--max-restarts "$LET_RESTARTS_IN_JOB")
    # Two starts without a new checkpoint end the job, as two attempts do.
    launcher+=(--ft-max-no-progress-cycles 2 --ft-checkpoint-iteration-file
        "$OUTPUT/checkpoints/latest_checkpointed_iteration.txt")
    # Megatron reports these sections, and no heartbeats outside of them.
    launcher+=(--ft-initial-rank-heartbeat-timeout null --ft-rank-heartbeat-timeout null
        --ft-rank-section-timeouts "setup:$((3 * step)),step:$step,checkpointing:$((3 * step))"
        --ft-rank-out-of-section-timeout "$((3 * step))")
}
