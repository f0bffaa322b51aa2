#!/usr/bin/env bash
# Slurm for tests/launch, from Debian's packages; without root or apt those tests skip.
set -euo pipefail
command -v slurmctld >/dev/null && command -v munged >/dev/null && exit 0
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "install_slurm: needs root and apt-get; tests/launch will skip" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null ||
    echo "install_slurm: apt-get could not install slurm-wlm and munge; tests/launch will skip" >&2
