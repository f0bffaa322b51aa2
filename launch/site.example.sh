#!/usr/bin/env bash
# Everything about one cluster. Copy to launch/site.sh (git ignores it) or set LET_SITE to your copy.
# Sourced before submitting and again in the job; what is in the environment already wins.

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
# LET_PYTHON=.venv/bin/python         # in a container: python3
# LET_CONTAINER=                      # pyxis or apptainer, with
# LET_IMAGE=                          #   the image, which has Python, torch and megatron_let's needs
# LET_MOUNTS=                         #   and host folders besides the repository and LET_RUNS
# LET_GPUS_PER_NODE=8
# export LET_MIN_BUS_GBPS=            # all-reduce bandwidth under which the nodes are refused, GB/s
# LET_PREFLIGHT=on                    # off starts without looking at the nodes
# LET_MAX_RESTARTS=50
