#!/usr/bin/env bash
# Check the nodes of this job, each alone and then all together. Sourced by job.sh.

check_nodes() {
    local code=0 limit="${LET_PREFLIGHT_SECONDS:-300}" free
    # Later a save needs the space of one checkpoint more, and the default is that of three.
    [[ $(iteration) == 0 ]] || LET_DISK_GIB=$((LET_DISK_GIB / 3))
    free="$(($(df --output=avail -k -- "$OUTPUT" | tail -n 1) / 1048576))"
    ((free >= LET_DISK_GIB)) || end "$EXIT_BAD_NODE" "error: the disk of $OUTPUT has $free GiB free," \
        "$LET_DISK_GIB needed: free some, or set LET_DISK_GIB"
    begin_step preflight
    VERDICTS="$LET_STEP_DIR/nodes"
    mkdir -p -- "$VERDICTS"
    # One node's failure must not kill the other nodes' checks, or they would look unfit too.
    compose_step --kill-on-bad-exit=0 --ntasks="$SLURM_NNODES" --ntasks-per-node=1
    timeout --kill-after=15 "$limit" "${STEP[@]}" once megatron_let.doctor.node \
        --output "$OUTPUT" --verdicts "$VERDICTS" || true
    _refuse_bad_nodes
    compose_step --kill-on-bad-exit=1
    timeout --kill-after=15 "$limit" "${STEP[@]}" ranks megatron_let.doctor.nodes \
        --verdicts "$VERDICTS" || code=$?
    _refuse_bad_nodes
    ((code == 0)) || _refuse_together "$code"
}

# A verdict is a file named after its node: empty if the node is fit, else one problem per line.
_refuse_bad_nodes() {
    local node bad=""
    while IFS= read -r node; do
        if [[ ! -e $VERDICTS/$node ]]; then
            say "node $node: the doctor did not finish; the end of $OUTPUT/logs/node_$node.log:"
            this_attempts_lines "$OUTPUT/logs/node_$node.log" | tail -n 5 | sed 's/^/    /'
        elif [[ -s $VERDICTS/$node ]]; then
            sed "s/^/launch: node $node: /" "$VERDICTS/$node"
        else
            continue
        fi
        bad+="${bad:+,}$node"
    done <"$ATTEMPT/nodes.txt"
    [[ -z $bad ]] || end "$EXIT_BAD_NODE" "error: nodes $bad are not fit to train:" \
        "submit again with --exclude=$bad, and have them checked"
}

_refuse_together() {
    local failure time code="$1" rank node="" error="each node is fit, but not all together"
    # srun's exit code is that of the rank it killed last.
    if failure="$(first_failure)"; then
        read -r time code rank node <<<"$failure"
        show_failure "$time" "$code" "$rank" "$node"
    fi
    if [[ $code == "$EXIT_BAD_NODE" ]]; then
        # The measurement cannot identify a single node.
        error="the all-reduce between the nodes is under LET_MIN_BUS_GBPS=${LET_MIN_BUS_GBPS:-}" node=""
    fi
    end "$EXIT_BAD_NODE" "error: $error (code $code): check LET_FABRIC and the interface" \
        "names${node:+, or submit again with --exclude=$node}"
}
