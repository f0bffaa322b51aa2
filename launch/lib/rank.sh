#!/usr/bin/env bash
# One rank: a log, appended across attempts, and a line with its exit code.
#   RANK=N bash rank.sh COMMAND...
set -uo pipefail
node="${SLURMD_NODENAME:-$(hostname)}"
log="$OUTPUT/logs/$(printf 'rank_%04d.log' "$RANK")"
ending="$LET_STEP_DIR/exits/$RANK"
printf '==== attempt %s, job %s, node %s, %(%F %T)T: %s\n' \
    "$LET_ATTEMPT" "$SLURM_JOB_ID" "$node" -1 "${*:4:1}" >>"$log"
# Reserve space for the exit code now, so that a full disk does not hide the failed rank.
printf '%100s\n' '' >"$ending"
# The rank gets its own SIGTERM; this script only notes that it was terminated.
terminated=""
trap 'terminated=1' TERM
# Megatron logs most on rank 0 and the losses on the last rank: copy both to the job's output.
# Not a pipe: the rank's helper processes hold it open, and its end would not be noticed.
if [[ $RANK == 0 || $RANK == $((WORLD_SIZE - 1)) ]]; then
    "$@" > >(trap '' TERM && exec tee -a "$log") 2>&1
else
    "$@" >>"$log" 2>&1
fi
code=$?
((code)) || exit 0
# torchrun exits with 1 whatever the rank's code, and each node reports a different first failure.
if [[ -z $terminated ]]; then
    printf '%s %s %s %s\n' "$EPOCHREALTIME" "$code" "$RANK" "$node" 1<>"$ending"
    # Give tee time to write the last lines.
    sleep 0.5
fi
# A checkpoint writer outlives its rank and holds the output open; Slurm would wait a minute for it.
# This kills the whole process group including this script; the exit code is in the file.
kill -KILL 0
