#!/usr/bin/env bash
# One Slurm task of a step: all ranks of a node by torchrun, or one rank where each has a task.
#   bash node.sh MODULE [ARGUMENTS]
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/env/common.sh
. "$here/../env/common.sh"
# shellcheck source=launch/env/infiniband.sh
. "$here/../env/$LET_FABRIC.sh"

rank=(bash "$here/rank.sh" "$LET_PYTHON" -u -m "$@")
if [[ -n ${LET_SHOW:-} ]]; then
    SLURM_NNODES="\$SLURM_NNODES" node_rank="\$SLURM_NODEID"
    LET_MASTER_ADDR="first-node" LET_MASTER_PORT="20000+job" SLURM_NTASKS="$SLURM_NNODES"
else
    node_rank=$(((SLURM_NODEID + LET_NODE_SHIFT) % SLURM_NNODES))
fi
# Static, not c10d: rank 0 is on a known node, and a restart can move ranks on purpose.
launcher=("$LET_PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$node_rank"
    --nproc-per-node "$LET_RANKS_PER_NODE" --master-addr "$LET_MASTER_ADDR"
    --master-port "$LET_MASTER_PORT" --no-python)

if [[ -n ${LET_SHOW:-} ]]; then
    printf '%s ' "${launcher[@]}"
    printf '%q ' "${rank[@]}"
    echo
    exit
fi
if [[ $SLURM_PROCID == 0 && ! -e $LET_RECORD_DIR/environment.txt ]]; then
    # Named variables only: the whole environment would hold keys and passwords.
    env | grep -E '^(SLURM_JOB_(ID|NAME|NODELIST|NUM_NODES|PARTITION)|NCCL_\w+|GLOO_\w+|UCX_\w+|FI_\w+|TORCH_(NCCL|FR)_\w+|PYTORCH_\w*ALLOC_CONF|CUDA_(VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS)|OMP_NUM_THREADS|TRITON_CACHE_DIR|DATA|TEACHER|TOKENIZER|OUTPUT)=' |
        sort >"$LET_RECORD_DIR/environment.txt"
    "$LET_PYTHON" -c 'import importlib.metadata as m, sys
print(f"python=={sys.version.split()[0]}")
print(*sorted({f"{d.name}=={d.version}" for d in m.distributions()}), sep="\n")' \
        >"$LET_RECORD_DIR/packages.txt"
fi
if ((SLURM_NTASKS == SLURM_NNODES)); then
    exec "${launcher[@]}" "${rank[@]}"
fi
export RANK=$(((SLURM_PROCID + LET_NODE_SHIFT * LET_RANKS_PER_NODE) % SLURM_NTASKS))
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$LET_RANKS_PER_NODE"
export MASTER_ADDR="$LET_MASTER_ADDR" MASTER_PORT="$LET_MASTER_PORT"
exec "${rank[@]}"
