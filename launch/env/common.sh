#!/usr/bin/env bash
# Environment of every rank, on any fabric. One reason a line.
# Megatron's overlap of tensor-parallel communication needs one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A rank's CPU threads would fight with its neighbours' for the same cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Activations of changing sizes fragment the memory less when segments can grow.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Hundreds of ranks that compile into one shared home lock each other out; a node's disk is near.
export TRITON_CACHE_DIR="${LET_LOCAL_DISK:-/tmp}/let-$UID/triton"
# As Triton's, for what torch.compile makes.
export TORCHINDUCTOR_CACHE_DIR="${LET_LOCAL_DISK:-/tmp}/let-$UID/inductor"
# Compute nodes often reach no hub, and a rank would wait for it.
export HF_HUB_OFFLINE=1
# Offline runs of wandb lie with the run, not in the repository.
export WANDB_DIR="$OUTPUT"
