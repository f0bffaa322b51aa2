#!/usr/bin/env bash
# Settings of one cluster. Copy to launch/site.sh (ignored by git), or set LET_SITE to the copy.
# Sourced before submitting and again in the job; everything is exported. A variable that is already
# in the environment wins where this file uses ${NAME:-...} or := .

# Read by sbatch. `bash launch/pretrain_7b_let.sh` sources this file before it submits; for a plain
# `sbatch`, source it first or give these as options.
export SBATCH_PARTITION="${SBATCH_PARTITION:-gpu}"
export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-my-account}"

# Data and folders, on a file system shared by all nodes.
: "${DATA:=/data/pile_text_document}" # indexed data, without .bin and .idx
: "${LET_MODELS:=/models}"            # folder of SmolLM2-135M and SmolLM2-1.7B; TEACHER=DIR wins
: "${LET_RUNS:=/scratch/$(id -un)/runs}" # one folder per run, named after the job

# The network: a file of launch/env/, and the interface between the nodes (see `ip address`).
: "${LET_FABRIC:=infiniband}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}"
# The adapters of the compute network, if a node has others too, such as storage ports (`ibstat`).
# Without =, names match by prefix: mlx5 is every adapter.
# export NCCL_IB_HCA="=mlx5_0,mlx5_1,mlx5_4,mlx5_5"

# Optional; the values here are the defaults. Numbers have no unit.
# module load cuda                    # commands that a job needs before Python starts
# LET_PYTHON=                         # .venv/bin/python of the repository; in a container, python3
# LET_CONTAINER=                      # pyxis or apptainer, with
# LET_IMAGE=                          #   the image: Python with megatron_let's dependencies
# LET_MOUNTS=                         #   folders besides the repository, LET_RUNS, data and teacher
# LET_LOCAL_DISK=/tmp                 # a node's local disk, for compiled kernels
# LET_GPUS_PER_NODE=8
# LET_GPU_GIB=75                      # memory of each GPU, GiB; 38 for DeepSpeed's script
# LET_DISK_GIB=                       # free disk needed to start, GiB; default: three checkpoints; a third to resume
# LET_MIN_BUS_GBPS=0                  # minimum all-reduce bandwidth to start, GB/s
# LET_PREFLIGHT=on                    # off: start without checking the nodes
# LET_PREFLIGHT_SECONDS=300           # time limit of each of the two checks
# LET_MAX_RESTARTS=50
# LET_RESTARTS_IN_JOB=0               # restarts of the ranks within the job; needs nvidia-resiliency-ext
# LET_HANG_SECONDS=600                # with it: the longest step before a rank counts as hung
