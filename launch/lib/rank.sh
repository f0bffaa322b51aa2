#!/usr/bin/env bash
# One rank: a log, appended across attempts, and a line with its exit code. A rank that prints
# nothing, as most of a large job, has no log.
#   RANK=N bash rank.sh COMMAND...
set -uo pipefail
node="${SLURMD_NODENAME:-$(hostname)}"
log="$OUTPUT/logs/$(printf 'rank_%04d.log' "$RANK")"
ending="$LET_STEP_DIR/exits/$RANK"
printf -v head '==== attempt %s, job %s, node %s, %(%F %T)T: %s' \
    "$LET_ATTEMPT" "$SLURM_JOB_ID" "$node" -1 "${*:4:1}"

# Open the log at the first line of the standard input, and copy all of it.
log_from_first_line() {
    local line
    trap '' TERM
    # A last line may lack its end.
    IFS= read -r line || [[ -n $line ]] || return 0
    # If the log cannot be opened, the job's output must do.
    { printf '%s\n%s\n' "$head" "$line" && exec cat; } >>"$log" ||
        { printf '%s\n' "$line" && exec cat; } >&2
}

# Reserve space for the exit code now, so that a full disk does not hide the failed rank.
printf '%100s\n' '' >"$ending"
# The rank gets its own SIGTERM; this script only notes that it was terminated.
terminated=""
trap 'terminated=1' TERM
# Megatron logs most on rank 0 and the losses on the last rank: copy both to the job's output.
# Not a pipe: the rank's helper processes hold it open, and its end would not be noticed.
if [[ $RANK == 0 || $RANK == $((WORLD_SIZE - 1)) ]]; then
    printf '%s\n' "$head" >>"$log"
    "$@" > >(trap '' TERM && exec tee -a "$log") 2>&1
elif [[ -e $log ]]; then
    # Also if it prints nothing: lines of an earlier attempt must not pass for this one's.
    printf '%s\n' "$head" >>"$log"
    "$@" >>"$log" 2>&1
else
    "$@" > >(log_from_first_line) 2>&1
fi
code=$?
((code)) || exit 0
# torchrun exits with 1 whatever the rank's code, and each node reports a different first failure.
if [[ -z $terminated ]]; then
    printf '%s %s %s %s\n' "$EPOCHREALTIME" "$code" "$RANK" "$node" 1<>"$ending"
    # Give tee or cat time to write the last lines.
    sleep 0.5
fi
# A checkpoint writer outlives its rank and holds the output open; Slurm would wait a minute for it.
# This kills the whole process group including this script; the exit code is in the file.
kill -KILL 0
