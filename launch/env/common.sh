#!/usr/bin/env bash
# Environment of every rank, on any fabric; a comment gives the reason of each setting.
# The ranks of a node share its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Hundreds of ranks that compile into a shared home wait for each other's locks: use the local disk.
export TRITON_CACHE_DIR="${LET_LOCAL_DISK:-/tmp}/let-$UID/triton"
# As for Triton, for torch.compile.
export TORCHINDUCTOR_CACHE_DIR="${LET_LOCAL_DISK:-/tmp}/let-$UID/inductor"
# Compute nodes often cannot reach the hub, and a rank would wait for it.
export HF_HUB_OFFLINE=1
# Keep wandb's offline runs in the run's folder, not in the repository.
export WANDB_DIR="$OUTPUT"
