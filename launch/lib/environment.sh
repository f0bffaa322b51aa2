#!/usr/bin/env bash
# The repository's Python environment: made on the first call, checked in milliseconds afterwards.
#
#   . launch/lib/environment.sh && ensure_environment dev && "$LET_PYTHON" -m pytest
#   bash launch/lib/environment.sh dev evaluation      # the same, and prints the interpreter
#
# The arguments are extras of setup.py; those asked for earlier stay installed.
# LET_VENV  the environment's folder, instead of .venv in the repository's root
# PYTHON    the interpreter to make a new environment with, if it is Python 3.12 or newer

# A caller that sources this keeps its own shell options.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
fi

_ENVIRONMENT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"

# Prints "ok VERSION EXECUTABLE" or "no REASON"; %-formatting, so that any Python can say no.
_ENVIRONMENT_PROBE='
import os, shutil, sys, sysconfig
version = "%d.%d.%d" % sys.version_info[:3]
def refuse(reason):
    print("no is Python " + version + reason)
    sys.exit()
if sys.version_info < (3, 12):
    refuse("")
try:
    import ensurepip, venv
except ImportError as error:
    refuse(" without the module " + error.name)
# megatron-core 0.19 has wheels for 3.12 and 3.13; later ones compile its dataset helper.
if sys.version_info >= (3, 14):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        refuse(", for which megatron-core must be compiled, without a C++ compiler")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        refuse(", for which megatron-core must be compiled, without the header Python.h")
print("ok " + version + " " + (getattr(sys, "_base_executable", "") or sys.executable))
'

# Make the environment or bring it up to date, and set LET_PYTHON to its interpreter.
ensure_environment() {
    local venv="${LET_VENV:-$_ENVIRONMENT_ROOT/.venv}" extra
    [[ $venv == /* ]] || venv="$PWD/$venv"
    LET_PYTHON="$venv/bin/python"
    _environment_is_current "$venv" "$@" && return 0
    for extra in "$@"; do
        # pip only warns about an extra that does not exist.
        if ! grep -qF "\"$extra\": [" "$_ENVIRONMENT_ROOT/setup.py"; then
            _environment_say "error: setup.py has no extra '$extra': use one of its extras_require"
            return 1
        fi
    done
    _environment_install "$venv" "$@"
}

_environment_say() {
    printf 'environment: %s\n' "$*" >&2
}

# The stamp is written last. Its lines: where the environment was made, fingerprint, extras.
_environment_is_current() {
    local venv="$1" stamp="$1/.let-stamp" made_at fingerprint extras extra
    shift
    [[ -x $venv/bin/python && -r $stamp ]] || return 1
    { IFS= read -r made_at && read -r fingerprint && read -r extras; } <"$stamp" || return 1
    [[ $made_at == "$venv" && $fingerprint == "$(_environment_fingerprint "$venv")" ]] || return 1
    for extra in "$@"; do
        [[ " $extras " == *" $extra "* ]] || return 1
    done
}

# What the installed packages follow from; pyvenv.cfg holds the interpreter's version.
_environment_fingerprint() {
    local root="$_ENVIRONMENT_ROOT"
    {
        printf '%s\n' "$root"
        cat -- "$root/setup.py" "$root/constraints.txt" "$1/pyvenv.cfg"
    } | cksum
}

_environment_is_usable() {
    "$1/bin/python" -I -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' &>/dev/null
}

# A subshell: the lock and the shell options end with it.
_environment_install() (
    set -uo pipefail
    venv="$1" stamp="$1/.let-stamp" start="$SECONDS" python="" made_at="" extras=""
    shift
    # Searched before anything is created, so that a machine without Python is left as it was.
    if ! _environment_is_usable "$venv"; then
        python="$(_environment_find_python)" || exit 1
    fi
    # Our lock comes before any other file, so another caller may be in the midst of making it.
    if [[ -d $venv && ! -e $venv/pyvenv.cfg && -n $(_environment_contents "$venv") &&
        ! -e $venv/.let-lock ]]; then
        _environment_say "error: $venv holds files but is no Python environment:" \
            "remove it, or set LET_VENV to another folder"
        exit 1
    fi
    if ! mkdir -p -- "$venv" || ! exec 9>>"$venv/.let-lock"; then
        _environment_say "error: cannot write to $venv: set LET_VENV to a folder that can be written"
        exit 1
    fi
    if command -v flock >/dev/null && ! flock -n 9; then
        _environment_say "waiting for another process that is installing into $venv"
        flock 9 || _environment_say "no lock on $venv: do not start two installs at once"
    fi
    _environment_is_current "$venv" "$@" && exit 0

    [[ ! -r $stamp ]] || { IFS= read -r made_at && read -r _ && read -r extras; } <"$stamp" || true
    for extra in "$@"; do
        [[ " $extras " == *" $extra "* ]] || extras+="${extras:+ }$extra"
    done
    # A moved copy's programs start the original's interpreter, so only a new one will do.
    if [[ -n $made_at && $made_at != "$venv" ]]; then
        _environment_say "$venv is a copy of $made_at: making it anew"
        _environment_contents "$venv" -exec rm -rf -- {} + >/dev/null
    fi
    # Gone before the first change: without its stamp an interrupted install is done again.
    rm -f -- "$stamp"
    if ! _environment_is_usable "$venv"; then
        [[ -n $python ]] || python="$(_environment_find_python)" || exit 1
        _environment_say "making $venv with $python"
        if ! output="$("$python" -I -m venv "$venv" 2>&1 </dev/null)"; then
            _environment_explain "cannot make $venv with $python" "$output"
            exit 1
        fi
    fi
    # pip takes a package whose install was interrupted for installed; INSTALLER comes last.
    for folder in "$venv"/lib/python*/site-packages/*.dist-info; do
        [[ -e $folder/INSTALLER ]] || rm -rf -- "$folder"
    done

    requirement=".${extras:+[${extras// /,}]}"
    _environment_say "installing megatron_let${requirement#.} into $venv (about 5 GB when new)"
    # Kept in memory: on a full disk a log file would lose the line that says so.
    screen=/dev/null
    [[ ! -t 2 ]] || screen=/dev/fd/2
    if ! output="$(cd -- "$_ENVIRONMENT_ROOT" && "$venv/bin/python" -I -m pip install \
        --disable-pip-version-check --no-input --constraint constraints.txt \
        --editable "$requirement" 2>&1 </dev/null | tee "$screen")"; then
        _environment_explain "pip could not install megatron_let into $venv" "$output"
        exit 1
    fi
    # megatron-core's build goes on without the helper when it does not compile.
    if ! compgen -G "$venv/lib/python*/site-packages/megatron/core/datasets/helpers_cpp*" >/dev/null
    then
        _environment_say "error: megatron-core's dataset helper did not compile in $venv:" \
            "remove that folder and install Python 3.12, for which it comes compiled"
        exit 1
    fi
    if ! printf '%s\n' "$venv" "$(_environment_fingerprint "$venv")" "$extras" >"$stamp.new" ||
        ! mv -- "$stamp.new" "$stamp"; then
        _environment_say "error: cannot write $stamp: free space on its disk and run this again"
        exit 1
    fi
    _environment_say "ready after $((SECONDS - start)) s"
)

# Print what the folder holds besides the lock and the stamp; more arguments go to find.
_environment_contents() {
    local folder="$1"
    shift
    find "$folder" -mindepth 1 -maxdepth 1 ! -name '.let-*' -print "$@"
}

# Print the best interpreter's path: the one PYTHON names, else 3.12, else 3.13, else a later one.
_environment_find_python() {
    local candidate verdict version path best_13="" best_later="" rejected=""
    while IFS= read -r candidate; do
        verdict="$("$candidate" -I -c "$_ENVIRONMENT_PROBE" 2>/dev/null </dev/null)" || verdict=""
        read -r verdict version path <<<"$verdict"
        if [[ $verdict != ok ]]; then
            [[ $verdict == no ]] && version+=" $path" || version="does not run"
            rejected+="${rejected:+; }$candidate $version"
            [[ $candidate != "${PYTHON:-}" ]] ||
                _environment_say "PYTHON=$candidate $version: looking for another"
            continue
        fi
        if [[ $candidate == "${PYTHON:-}" || $version == 3.12.* ]]; then
            printf '%s\n' "$path"
            return 0
        elif [[ $version == 3.13.* ]]; then
            best_13="${best_13:-$path}"
        else
            best_later="${best_later:-$path}"
        fi
    done < <(_environment_candidates)
    if [[ -n $best_13$best_later ]]; then
        printf '%s\n' "${best_13:-$best_later}"
        return 0
    fi
    _environment_say "error: found no Python 3.12 or newer with the modules venv and ensurepip" \
        "(${rejected:-no python3 on PATH}): install one, such as the packages python3.12 and" \
        "python3.12-venv, \`pyenv install 3.12\` or \`uv python install 3.12\`," \
        "or set PYTHON to its path"
    return 1
}

_environment_candidates() {
    local name root
    [[ -z ${PYTHON:-} ]] || printf '%s\n' "$PYTHON"
    for name in python3.12 python3.13 python3.14 python3; do
        # All of that name: pyenv's stand-in comes first and fails for a version not selected.
        type -aP "$name" || true
    done
    for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
        compgen -G "${root:-/nowhere}/versions/3.1[2-9]*/bin/python" || true
    done
    for name in 3.12 3.13 '>=3.12'; do
        # Its own ones only: PATH is done, and a stand-in of pyenv's there makes uv give up.
        UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_DOWNLOADS=never \
            uv python find --system "$name" 2>/dev/null || true
    done
}

# Say what failed, why as far as the output tells, and what to do; the output's end goes first.
_environment_explain() {
    local what="$1" output="$2" remedy
    tail -n 12 <<<"$output" | cut -c 1-300 >&2
    case "$output" in
    *"No space left on device"* | *"Disk quota exceeded"*)
        remedy="its disk or the one of \${TMPDIR:-/tmp} is full: free about 10 GB and run this again"
        ;;
    *"Failed to establish a new connection"* | *"name resolution"* | *"Connection to "* | \
        *"Read timed out"* | *"Network is unreachable"* | *"ProxyError"*)
        remedy="no package index answers: check the network or pip's index settings, run this again"
        ;;
    *)
        remedy="the lines above say why: correct it and run this again, which goes on from here"
        ;;
    esac
    _environment_say "error: $what: $remedy"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    ensure_environment "$@"
    printf '%s\n' "$LET_PYTHON"
fi
