#!/usr/bin/env bash
# One rank: its own log, appended across attempts, and a line about how it ended.
#   RANK=N bash rank.sh COMMAND...
set -uo pipefail
node="${SLURMD_NODENAME:-$(hostname)}"
log="$OUTPUT/logs/$(printf 'rank_%04d.log' "$RANK")"
ending="$LET_STEP_DIR/exits/$RANK"
printf '==== attempt %s, job %s, node %s, %(%F %T)T: %s\n' \
    "$LET_ATTEMPT" "$SLURM_JOB_ID" "$node" -1 "${*:4:1}" >>"$log"
# Its place on the disk is taken now, so that a full one does not hide who failed.
printf '%100s\n' '' >"$ending"
# The rank gets its own signal; this script only remembers that the end was asked for.
told=""
trap 'told=1' TERM
# Megatron prints most on rank 0 and the losses on the last rank: both are the job's output too.
# Not a pipe: the rank's helpers keep it open, and the end of the rank would not be seen.
if [[ $RANK == 0 || $RANK == $((WORLD_SIZE - 1)) ]]; then
    "$@" > >(trap '' TERM && exec tee -a "$log") 2>&1
else
    "$@" >>"$log" 2>&1
fi
code=$?
((code)) || exit 0
# torchrun's exit code is 1 whatever the rank's was, and on each node another rank comes first.
if [[ -z $told ]]; then
    printf '%s %s %s %s\n' "$EPOCHREALTIME" "$code" "$RANK" "$node" 1<>"$ending"
    # Its last lines reach the log in this time.
    sleep 0.5
fi
# A checkpoint writer outlives its rank and holds the output open, and Slurm would wait a minute for
# it. This ends the whole process group, this script too: the code is in the file.
kill -KILL 0
