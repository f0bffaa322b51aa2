#!/usr/bin/env bash
# Install Slurm for tests/launch from Debian's packages; without root or apt those tests skip.
set -euo pipefail

skip() {
    echo "install_slurm: $*; tests/launch will skip" >&2
    exit 0
}

command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && exit 0
[[ $EUID == 0 ]] || skip "needs root"
command -v apt-get >/dev/null || skip "needs apt-get"
export DEBIAN_FRONTEND=noninteractive
# Another install may hold apt's lock, and a package server may be unreachable.
apt=(timeout 300 apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2
    -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
"${apt[@]}" update >/dev/null || skip "apt-get update failed"
"${apt[@]}" install -y --no-install-recommends slurm-wlm munge >/dev/null ||
    skip "apt-get could not install slurm-wlm and munge"
