#!/usr/bin/env bash
# Print a folder for PYTHONPATH whose megatron package is that of a checkout of Megatron-LM:
#   bash tests/megatron_checkout.sh CHECKOUT PYTHON
# The checkout itself is not written to. Its sources are linked, and the compiled data helper is
# that of pip's wheel, as start-up would compile one beside the sources.
set -euo pipefail

checkout="$(realpath -- "$1")"
python="$2"
[[ -f $checkout/megatron/core/package_info.py ]] || {
    echo "MEGATRON_LM=$1 has no megatron/core: give the root of a checkout of Megatron-LM" >&2
    exit 2
}
wheel="$("$python" -I -c "import megatron; print(megatron.__path__[0])")"
folder="$(mktemp -d)"
cp -rs -- "$checkout/megatron" "$folder"
rm -f -- "$folder/megatron/core/datasets/Makefile"
cp -- "$wheel"/core/datasets/helpers_cpp*.so "$folder/megatron/core/datasets"
echo "$folder"
