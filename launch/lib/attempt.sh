#!/usr/bin/env bash
# One attempt of a run: its record, and whether the run makes progress. Sourced by job.sh.

refuse_finished() {
    if [[ -e $CHECKPOINTS/DONE ]]; then
        say "run $RUN is done (iteration $(iteration)); remove $CHECKPOINTS/DONE to train on"
        exit 0
    fi
    [[ ! -e $CHECKPOINTS/STOP ]] ||
        end "$EXIT_STOPPED" "run $RUN was stopped by $CHECKPOINTS/STOP: remove that file to continue"
}

# Print the iteration of the last complete checkpoint; 0 for none.
iteration() {
    local iteration=0
    [[ ! -r $CHECKPOINTS/latest_checkpointed_iteration.txt ]] ||
        read -r iteration <"$CHECKPOINTS/latest_checkpointed_iteration.txt" || true
    printf '%s\n' "$iteration"
}

# Append this attempt to attempts.tsv (number, job, iteration, time, nodes) and record its inputs.
begin_attempt() {
    local number=1 table="$OUTPUT/attempts.tsv"
    mkdir -p -- "$OUTPUT/logs" "$OUTPUT/flight_recorder" ||
        end "$EXIT_USAGE" "error: the run's folder $OUTPUT cannot be created: check LET_RUNS"
    [[ ! -r $table ]] || number=$(($(wc -l <"$table") + 1))
    ATTEMPT="$OUTPUT/attempts/$(printf '%04d' "$number")"
    export LET_ATTEMPT="$number" LET_RECORD_DIR="$ATTEMPT"
    say "run $RUN, attempt $number, job $SLURM_JOB_ID on $SLURM_JOB_NODELIST," \
        "from iteration $(iteration); logs in $OUTPUT/logs"
    if ! { printf '%s\t%s\t%s\t%s\t%s\n' "$number" "$SLURM_JOB_ID" "$(iteration)" \
        "$(date +%s)" "$SLURM_JOB_NODELIST" >>"$table" && _record; }; then
        end "$EXIT_USAGE" "error: $OUTPUT cannot be written: see the line above, and free its disk"
    fi
    # Slurm restarts a job after a node failure without going through _requeue.
    (($(tries_without_progress) <= 2)) || end_without_progress
}

# Record what only the host knows; node.sh adds packages, environment and the command.
_record() {
    local git=(git -C "$LET_ROOT" -c safe.directory="$LET_ROOT")
    mkdir -p -- "$ATTEMPT" && cp -- "$RECIPE" "$ATTEMPT/recipe.yaml" &&
        scontrol show hostnames "$SLURM_JOB_NODELIST" >"$ATTEMPT/nodes.txt" || return
    # The copy may not be a git repository.
    { "${git[@]}" rev-parse HEAD && "${git[@]}" status --short; } >"$ATTEMPT/commit.txt" 2>&1 || true
    "${git[@]}" diff HEAD >"$ATTEMPT/diff.patch" 2>/dev/null || true
}

# Print how many of this job's last attempts started from the current iteration.
tries_without_progress() {
    awk -F '\t' -v job="$SLURM_JOB_ID" -v now="$(iteration)" \
        '$2 == job { tries = $3 == now ? tries + 1 : 0 } END { print tries + 0 }' \
        "$OUTPUT/attempts.tsv"
}

end_without_progress() {
    end "$EXIT_NO_PROGRESS" "error: run $RUN is still at iteration $(iteration) after two attempts:" \
        "not requeued; find the reason above or in $OUTPUT/logs, then submit again"
}

# Create the folder in which each rank of a step writes its exit code.
begin_step() {
    export LET_STEP_DIR="$ATTEMPT/$1"
    mkdir -p -- "$LET_STEP_DIR/exits"
}
