#!/usr/bin/env bash
# Load and check the settings of a cluster. Sourced by job.sh.

# Source the site file and export its variables; $1 is the teacher's name under LET_MODELS.
# A dry run names what is missing, and shows the rest.
load_site() {
    local site="${LET_SITE:-$LET_ROOT/launch/site.sh}" name
    if [[ ! -r $site ]]; then
        _missing "there is no site file $site: copy launch/site.example.sh to launch/site.sh and" \
            "edit it, or set LET_SITE"
        site="$LET_ROOT/launch/site.example.sh"
    fi
    set -o allexport
    # A user's file may read variables that are not set.
    set +o nounset
    # shellcheck source=launch/site.example.sh
    . "$site"
    set -o nounset
    _check_numbers "$site"
    # The baseline uses the teacher's tokenizer too, so that the runs can be compared.
    TEACHER="${TEACHER:-${LET_MODELS:+$LET_MODELS/$1}}"
    TOKENIZER="${TOKENIZER:-$TEACHER}"
    LET_PYTHON="${LET_PYTHON:-$(_default_python)}"
    LET_GPUS_PER_NODE="${LET_GPUS_PER_NODE:-8}"
    LET_RANKS_PER_NODE="${LET_RANKS_PER_NODE:-$LET_GPUS_PER_NODE}"
    # The recipes are sized for GPUs of 80 GB, which show 79 GiB.
    LET_GPU_GIB="${LET_GPU_GIB:-75}"
    PYTHONPATH="$LET_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    for name in LET_RUNS DATA TEACHER LET_FABRIC ${LET_CONTAINER:+LET_IMAGE}; do
        if [[ -z ${!name:-} ]]; then
            _missing "$name is not set: set it in $site"
            printf -v "$name" '<%s>' "$name"
        fi
    done
    if [[ ! -r $LET_ROOT/launch/env/$LET_FABRIC.sh ]]; then
        _missing "LET_FABRIC is '$LET_FABRIC': set it to the name of a file in launch/env/, such as" \
            "infiniband"
        LET_FABRIC=infiniband
    fi
    set +o allexport
    [[ -n ${LET_CONTAINER:-} || -x $LET_PYTHON ]] ||
        _missing "there is no Python at $LET_PYTHON: create it on a login node with" \
            "bash launch/lib/environment.sh, or set LET_PYTHON in $site"
}

# Check the numbers before anything starts; $1 is the site file. Some are read after an attempt.
_check_numbers() {
    local name
    for name in LET_GPUS_PER_NODE LET_GPU_GIB LET_RANKS_PER_NODE LET_DISK_GIB LET_PREFLIGHT_SECONDS \
        LET_MAX_RESTARTS LET_RESTARTS_IN_JOB LET_HANG_SECONDS; do
        _check_number "$1" "$name" '^(0|[1-9][0-9]*)$' "a whole number"
    done
    _check_number "$1" LET_MIN_BUS_GBPS '^[0-9]+([.][0-9]+)?$' "a number"
}

_check_number() {
    [[ -z ${!2:-} || ${!2} =~ $3 ]] && return
    _missing "$2 is '${!2}': set it in $1 to $4 without a unit"
    unset "$2"
}

# End with an error, or note it in a dry run.
_missing() {
    [[ -n ${DRY_RUN:-} ]] || end "$EXIT_USAGE" "error: $*"
    echo "# missing: $*"
}

# Print the default Python; the host's virtual environment does not run in a container.
_default_python() {
    [[ -n ${LET_CONTAINER:-} ]] && echo python3 || echo "$LET_ROOT/.venv/bin/python"
}
