#!/usr/bin/env bash
# The end of an attempt: report what happened, then end or requeue the job. Sourced by job.sh.

# Megatron's exit codes for a suspicious or invalid result (core/rerun_state_machine.py).
readonly EXIT_RERUN_ELSEWHERE=16 EXIT_RESULT_INVALID=17
# Messages of gloo and NCCL on the other ranks after one has died.
readonly LOST_PEER='Connection (closed|reset) by peer|remote process exited|ncclRemoteError'

# Report what happened, then end or requeue; $1 is srun's exit code.
finish_attempt() {
    local code="$1" failure time="" rank="-" node=""
    if failure="$(first_failure)"; then
        read -r time code rank node <<<"$failure"
        show_failure "$time" "$code" "$rank" "$node"
    elif ((code)); then
        say "no rank recorded an exit code; the step ended with code $code; the nodes' last lines:"
        while IFS= read -r node; do
            this_attempts_lines "$OUTPUT/logs/node_$node.log" | tail -n 5 | sed 's/^/    /'
        done <"$ATTEMPT/nodes.txt"
    fi
    ((code == 0)) || _show_disk
    # This fails on a full disk, which _show_disk has reported.
    printf '%s\t%s\t%s\t%s\n' "$(date +%s)" "$code" "$rank" "$(iteration)" \
        2>/dev/null >"$ATTEMPT/result.tsv" || true
    if [[ -e $CHECKPOINTS/DONE ]]; then
        _show_wandb
        end 0 "run $RUN is done at iteration $(iteration)"
    elif [[ -e $CHECKPOINTS/STOP ]]; then
        end "$code" "run $RUN was stopped by $CHECKPOINTS/STOP at iteration $(iteration)"
    fi
    _refuse_requeue "$code"
    _requeue
}

_refuse_requeue() {
    case "$1" in
    "$EXIT_USAGE") end "$1" "error: the run cannot start with these settings: not requeued" ;;
    "$EXIT_RESULT_INVALID")
        end "$1" "error: Megatron found an invalid result (exit code 17): not requeued; its log" \
            "names the node and GPU; the last checkpoint (iteration $(iteration)) precedes it"
        ;;
    "$EXIT_RERUN_ELSEWHERE")
        # The next attempt reads this: the suspicious rank must run on another GPU.
        echo $((LET_NODE_SHIFT + 1)) >"$OUTPUT/node_shift"
        say "Megatron requests the last iteration again on another GPU (exit code 16)"
        ;;
    esac
}

_requeue() {
    (($(tries_without_progress) < 2)) || end_without_progress
    ((${SLURM_RESTART_COUNT:-0} < ${LET_MAX_RESTARTS:-50})) ||
        end "$EXIT_RESTARTS" "error: run $RUN was requeued ${SLURM_RESTART_COUNT:-0} times" \
            "(LET_MAX_RESTARTS): not requeued again; submit it again to continue"
    say "requeueing run $RUN at iteration $(iteration)"
    ask_slurm scontrol requeue "$SLURM_JOB_ID" ||
        end 1 "error: Slurm does not requeue job $SLURM_JOB_ID (above): submit it again to continue"
    # Slurm kills this script now.
    sleep 120
}

# Print "time code rank node" of the rank that failed first; terminated ranks write nothing.
first_failure() {
    local failures failure rank
    mapfile -t failures < <(awk 'FNR == 1 && NF && $2 != 0' "$LET_STEP_DIR"/exits/* 2>/dev/null |
        sort -n)
    for failure in "${failures[@]}"; do
        read -r _ _ rank _ <<<"$failure"
        # A rank that lost its peer may exit before the failed peer has finished its cleanup.
        if ! _last_lines "$rank" | grep -E "$LOST_PEER" >/dev/null; then
            printf '%s\n' "$failure"
            return
        fi
    done
    [[ ${#failures[@]} != 0 ]] && printf '%s\n' "${failures[0]}"
}

# Print the end of a rank's log, without lines of earlier attempts; nothing if the rank has none.
_last_lines() {
    this_attempts_lines "$(rank_log "$1")" | tail -n 30
}

# Print the lines of a log since the head of this attempt, which is printed too.
this_attempts_lines() {
    [[ -e $1 ]] || return 0
    awk -v head="==== attempt $LET_ATTEMPT, job $SLURM_JOB_ID," \
        '/^==== attempt / { ours = index($0, head) == 1 } ours' "$1"
}

rank_log() {
    printf '%s/logs/rank_%04d.log' "$OUTPUT" "$1"
}

show_failure() {
    local time="$1" code="$2" rank="$3" node="$4"
    say "rank $rank on node $node failed first, with exit code $code" \
        "at $(date -d "@${time%.*}" +%T); its last lines ($(rank_log "$rank")):"
    _last_lines "$rank" | sed 's/^/    /'
}

_show_disk() {
    local free
    free="$(df --output=avail -k -- "$OUTPUT" | tail -n 1)"
    ((free > 1048576)) || say "error: the disk of $OUTPUT has $((free / 1024)) MiB left: free some;" \
        "the checkpoint of iteration $(iteration) is complete"
}

_show_wandb() {
    if compgen -G "$OUTPUT/wandb/offline-run-*" >/dev/null; then
        say "to send the offline log: wandb sync $OUTPUT/wandb/offline-run-*"
    fi
}
