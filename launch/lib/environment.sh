#!/usr/bin/env bash
# Create the repository's Python environment, or check in milliseconds that it is up to date.
#
#   . launch/lib/environment.sh && ensure_environment dev && "$LET_PYTHON" -m pytest
#   bash launch/lib/environment.sh dev evaluation      # the same, and prints the interpreter
#
# Arguments are extras of setup.py; extras installed earlier stay installed.
# LET_VENV  folder of the environment (default: .venv in the repository's root)
# PYTHON    interpreter for a new environment, if it is Python 3.12 or newer

# A caller that sources this keeps its own shell options.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
fi

_ENVIRONMENT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"

# Prints "ok VERSION EXECUTABLE" or "no REASON"; %-formatting, so that any Python version can run it.
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

# Create or update the environment, and set LET_PYTHON to its interpreter.
ensure_environment() {
    local venv="${LET_VENV:-$_ENVIRONMENT_ROOT/.venv}" extra
    [[ $venv == /* ]] || venv="$PWD/$venv"
    LET_PYTHON="$venv/bin/python"
    _environment_is_current "$venv" "$@" && return 0
    for extra in "$@"; do
        # pip only warns about an unknown extra.
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

# The stamp is written last. Its lines: the environment's folder, fingerprint, extras.
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

# Checksum of what determines the installed packages; pyvenv.cfg holds the interpreter's version.
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

# Runs in a subshell, which ends the lock and the shell options.
_environment_install() (
    set -uo pipefail
    venv="$1" stamp="$1/.let-stamp" start="$SECONDS" python="" made_at="" extras=""
    shift
    # Search before creating anything, so that a machine without Python is left unchanged.
    if ! _environment_is_usable "$venv"; then
        python="$(_environment_find_python)" || exit 1
    fi
    # The lock is the first file, so another caller may be creating the environment.
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
    # -ef: the same folder, reached through a link.
    if [[ -n $made_at && $made_at != "$venv" && $made_at -ef $venv ]]; then
        _environment_say "error: $venv is a link to $made_at, the environment of another checkout:" \
            "remove the link, or set LET_VENV to another folder"
        exit 1
    fi
    # Programs of a moved copy start the original's interpreter, so recreate it.
    if [[ -n $made_at && $made_at != "$venv" ]]; then
        _environment_say "$venv is a copy of $made_at: recreating it"
        _environment_contents "$venv" -exec rm -rf -- {} + >/dev/null
    fi
    # Remove the stamp before the first change, so that an interrupted install is repeated.
    rm -f -- "$stamp"
    if ! _environment_is_usable "$venv"; then
        [[ -n $python ]] || python="$(_environment_find_python)" || exit 1
        _environment_say "making $venv with $python"
        if ! output="$("$python" -I -m venv "$venv" 2>&1 </dev/null)"; then
            _environment_explain "cannot make $venv with $python" "$output"
            exit 1
        fi
    fi
    # pip treats a half-installed package as installed; INSTALLER is written last.
    for folder in "$venv"/lib/python*/site-packages/*.dist-info; do
        [[ -e $folder/INSTALLER ]] || rm -rf -- "$folder"
    done

    requirement=".${extras:+[${extras// /,}]}"
    _environment_say "installing megatron_let${requirement#.} into $venv (when new, about 5 GB in 2 to" \
        "15 minutes)"
    # Kept in memory: on a full disk, a log file would lose the error.
    if ! output="$(cd -- "$_ENVIRONMENT_ROOT" && "$venv/bin/python" -I -m pip install \
        --disable-pip-version-check --no-input --constraint constraints.txt \
        --editable "$requirement" 2>&1 </dev/null | _environment_progress)"; then
        _environment_explain "pip could not install megatron_let into $venv" "$output"
        exit 1
    fi
    # megatron-core's build succeeds even if its dataset helper does not compile.
    if ! compgen -G "$venv/lib/python*/site-packages/megatron/core/datasets/helpers_cpp*" >/dev/null
    then
        _environment_say "error: megatron-core's dataset helper did not compile in $venv:" \
            "remove that folder and install Python 3.12, for which the wheel includes it"
        exit 1
    fi
    if ! printf '%s\n' "$venv" "$(_environment_fingerprint "$venv")" "$extras" >"$stamp.new" ||
        ! mv -- "$stamp.new" "$stamp"; then
        _environment_say "error: cannot write $stamp: free space on its disk and run this again"
        exit 1
    fi
    _environment_say "ready after $((SECONDS - start)) s"
)

# Copy pip's lines; on a terminal, keep one line of what it does and of the time left.
_environment_progress() {
    # The direct dependencies and theirs are about 120.
    local line doing="" count=0 total=120 left start="$SECONDS"
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case "$line" in
        Collecting*) doing="resolving" ;;
        *Downloading*.whl* | *"Using cached"*.whl*) doing="downloading" ;;
        Installing*) doing="unpacking" ;;
        *) continue ;;
        esac
        # A package is resolved, then downloaded; unpacking takes about half as long.
        ((++count <= 2 * total)) || count=$((2 * total))
        left=$(((SECONDS - start) * (3 * total - count) / count / 60 + 1))
        [[ ! -t 2 ]] ||
            printf '\renvironment: %s, about %d min left\e[K' "$doing" "$left" >&2
    done
    [[ ! -t 2 ]] || printf '\r\e[K' >&2
}

# Print the folder's contents without the lock and the stamp; more arguments go to find.
_environment_contents() {
    local folder="$1"
    shift
    find "$folder" -mindepth 1 -maxdepth 1 ! -name '.let-*' -print "$@"
}

# Print the path of the interpreter: the one PYTHON names, else 3.12, else 3.13, else a later one.
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
        # All of that name: a pyenv shim comes first and fails for a version not selected.
        type -aP "$name" || true
    done
    for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
        compgen -G "${root:-/nowhere}/versions/3.1[2-9]*/bin/python" || true
    done
    for name in 3.12 3.13 '>=3.12'; do
        # Managed ones only: PATH was searched above, and uv gives up at a pyenv shim there.
        UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_DOWNLOADS=never \
            uv python find --system "$name" 2>/dev/null || true
    done
}

# Print the end of the output, then what failed and what to do about it.
_environment_explain() {
    local what="$1" output="$2" remedy
    tail -n 12 <<<"$output" | cut -c 1-300 >&2
    case "$output" in
    *"No space left on device"* | *"Disk quota exceeded"*)
        remedy="its disk or the one of \${TMPDIR:-/tmp} is full: free about 10 GB and run this again"
        ;;
    *"Failed to establish a new connection"* | *"name resolution"* | *"Connection to "* | \
        *"Read timed out"* | *"Network is unreachable"* | *"ProxyError"*)
        remedy="the package index cannot be reached: check the network or pip's index settings, run this again"
        ;;
    *)
        remedy="the lines above say why: correct it and run this again to continue from here"
        ;;
    esac
    _environment_say "error: $what: $remedy"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    ensure_environment "$@"
    printf '%s\n' "$LET_PYTHON"
fi
