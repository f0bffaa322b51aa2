#!/usr/bin/env bash
# Everything about one cluster. Copy to launch/site.sh (git ignores it) or set LET_SITE to your copy.
# Sourced before submitting and again in the job, and all of it is exported; what is in the
# environment already wins where it says ${NAME:-...} or := .

# sbatch reads these itself; `bash launch/pretrain_7b_let.sh` sources this file before it submits,
# for a plain `sbatch` source it first or give them as options.
export SBATCH_PARTITION="${SBATCH_PARTITION:-gpu}"
export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-my-account}"

# Data and folders, on a file system that all nodes share.
: "${DATA:=/data/pile_text_document}" # indexed data, without .bin and .idx
: "${LET_MODELS:=/models}"            # holds SmolLM2-135M and SmolLM2-1.7B; TEACHER=DIR wins
: "${LET_RUNS:=/scratch/$USER/runs}"  # one folder a run, named after the job

# The network: a file of launch/env/, and the interface of the nodes' own network (`ip address`).
: "${LET_FABRIC:=infiniband}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}"

# Optional; the values here are the defaults.
# module load cuda                    # what a job needs before Python starts
# LET_PYTHON=                         # .venv/bin/python of the repository; in a container, python3
# LET_CONTAINER=                      # pyxis or apptainer, with
# LET_IMAGE=                          #   the image: Python with megatron_let's dependencies
# LET_MOUNTS=                         #   folders besides the repository, LET_RUNS, data and teacher
# LET_LOCAL_DISK=/tmp                 # a node's own disk, for compiled kernels
# LET_GPUS_PER_NODE=8
# LET_DISK_GIB=                       # free disk a start needs; each script knows its checkpoints
# LET_MIN_BUS_GBPS=0                  # all-reduce bandwidth below which no run starts, GB/s
# LET_PREFLIGHT=on                    # off starts without looking at the nodes
# LET_PREFLIGHT_SECONDS=300           # for each of the two looks
# LET_MAX_RESTARTS=50
