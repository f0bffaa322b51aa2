#!/usr/bin/env bash
# One Slurm task of a step, on the host or in a container.
#   bash node.sh ranks MODULE [ARGUMENTS]    all ranks of a node by torchrun, or one rank per task
#   bash node.sh once MODULE [ARGUMENTS]     one process per node that is not a rank
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/env/common.sh
. "$here/../env/common.sh"
# shellcheck source=launch/env/infiniband.sh
. "$here/../env/$LET_FABRIC.sh"
# shellcheck source=launch/lib/launcher.sh
. "$here/launcher.sh"
kind="$1"
shift

# Only these variables: the whole environment may contain keys and passwords.
readonly RECORDED='^(SLURM_JOB_(ID|NAME|NODELIST|NUM_NODES|PARTITION)|(NCCL|GLOO|UCX|FI|TORCH_NCCL|TORCH_FR)_[A-Z0-9_]+|PYTORCH_[A-Z_]*ALLOC_CONF|CUDA_(VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS)|OMP_NUM_THREADS|TRITON_CACHE_DIR|DATA|TEACHER|TOKENIZER|OUTPUT)='

named_variables() {
    env | grep -E "$RECORDED" | sort
}

# Record what only the (container's) Python knows; job.sh records the rest.
record() {
    named_variables >"$LET_RECORD_DIR/environment.txt"
    printf '%q ' "$@" >"$LET_RECORD_DIR/command.txt"
    "$LET_PYTHON" -c 'import importlib.metadata as m, sys
print(f"python=={sys.version.split()[0]}")
print(*sorted({f"{d.name}=={d.version}" for d in m.distributions()}), sep="\n")' \
        >"$LET_RECORD_DIR/packages.txt"
}

# Set launcher, and rank: one rank of the module and its arguments.
compose() {
    local problem
    rank=(bash "$here/rank.sh" "$LET_PYTHON" -u -m "${module[@]}")
    if [[ $kind == ranks ]] && restarts_in_job "${module[0]}"; then
        problem="$(restarts_problem)"
        if [[ -z $problem ]]; then
            compose_ft_launcher "$@"
            rank+=(--enable-ft-package)
            return
        fi
        echo "error: LET_RESTARTS_IN_JOB is '$LET_RESTARTS_IN_JOB', but $problem; unset it or correct that" >&2
        # A login node may lack what the nodes or the container have.
        [[ -n ${LET_SHOW:-} ]] || exit 2
    fi
    compose_torchrun "$@"
}

module=("$@")
if [[ -n ${LET_SHOW:-} ]]; then
    compose "\$SLURM_NNODES" "\$SLURM_NODEID" first-node 20000+job+attempt
    printf '%s ' "${launcher[@]}"
    printf '%q ' "${rank[@]}"
    echo
    echo "# with"
    named_variables | sed 's/^/#   /'
    exit
fi

# torchrun's messages would hide the first failure among the ranks' output.
name="${SLURMD_NODENAME:-$(hostname)}"
exec 2>>"$OUTPUT/logs/node_$name.log"
printf '==== attempt %s, job %s, %(%F %T)T: %s\n' "$LET_ATTEMPT" "$SLURM_JOB_ID" -1 "$1" >&2
if [[ $kind == once ]]; then
    exec "$LET_PYTHON" -m "${module[@]}"
fi
compose "$SLURM_NNODES" "$(((SLURM_NODEID + LET_NODE_SHIFT) % SLURM_NNODES))" \
    "$LET_MASTER_ADDR" "$LET_MASTER_PORT"
[[ $SLURM_PROCID != 0 ]] || record "${launcher[@]}" "${rank[@]}"
if ((SLURM_NTASKS == SLURM_NNODES)); then
    exec "${launcher[@]}" "${rank[@]}"
fi
export RANK=$(((SLURM_PROCID + LET_NODE_SHIFT * LET_RANKS_PER_NODE) % SLURM_NTASKS))
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$LET_RANKS_PER_NODE"
export MASTER_ADDR="$LET_MASTER_ADDR" MASTER_PORT="$LET_MASTER_PORT"
# A separate process group, as with torchrun: rank.sh kills the whole group.
exec setsid --wait "${rank[@]}"
