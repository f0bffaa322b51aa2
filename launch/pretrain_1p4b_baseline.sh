#!/usr/bin/env bash
# The paper's 1.4B without a teacher, on 4 nodes x 8 A100 80GB: sbatch launch/pretrain_1p4b_baseline.sh
#SBATCH --job-name=baseline_1p4b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=URG@600
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --output=%x.out
#SBATCH --open-mode=append
set -euo pipefail
launch="$(dirname -- "${BASH_SOURCE[0]}")"
# sbatch runs a copy in its spool folder; Slurm, once it answers, knows the folder of the original.
[[ -e $launch/lib/job.sh ]] || : "${SLURM_JOB_ID:?start this script in launch/ of the repository}"
for seconds in 10 20 40 80 150; do
    [[ ! -e $launch/lib/job.sh ]] || break
    launch="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's|.* Command=\(.*\)/pretrain_[^/]*\.sh.*|\1|p')" ||
        sleep "$seconds"
done
# shellcheck source=launch/lib/job.sh
. "$launch/lib/job.sh"
run_job configs/baseline_1p4b.yaml SmolLM2-135M 60 "$@"
