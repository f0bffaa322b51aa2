#!/usr/bin/env bash
# Measure everything on a machine's first GPU in one command: OUT=DIR bash tools/benchmark/first_hour.sh
#
# Parts, in this order; PARTS="..." selects some. Each has its own limit, and the rest continues
# without one that fails or is stopped. CSV files are written as they come.
#
#   facts       the machine, and megatron_let.doctor
#   tests       tests/gpu
#   kernel      tools/benchmark/cosine_interp.py
#   step        tools/benchmark/step_time.py: the paper's 1.4B with a teacher of SmolLM2-135M's shape
#   uncompiled  the same with --no-let-teacher-compile
#   aligned     the same with --ffn-hidden-size 5504, a multiple of 128, in place of the paper's 5461
#   quickstart  a student without and with the SmolLM2-135M teacher
#   recipe      the 1.4B recipe with 6 layers, asynchronous saves and S_stop in the run; its memory as
#               nvidia-smi sees it
#
# TEACHER   model for the last two (default: the quickstart's); PYTHON: default .venv/bin/python
# LIMIT     seconds for all (3600); FACTOR multiplies the limits of the parts
# DRY_RUN=1 tiny sizes, which is also what runs without a GPU
set -uo pipefail

: "${OUT:?set OUT to the folder for the results}"
mkdir -p "$OUT/logs"
OUT="$(realpath "$OUT")"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit
PARTS="${PARTS:-facts tests kernel step uncompiled aligned quickstart recipe}"
LIMIT="${LIMIT:-3600}" FACTOR="${FACTOR:-1}" DRY_RUN="${DRY_RUN:-}"
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 WANDB_MODE=offline
SECONDS=0

say() { printf '%5ds  %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary.txt"; }

# part NAME SECONDS COMMAND...: run a part if it is wanted, within its limit and what is left of all.
part() {
    local name="$1" limit="$(($2 * FACTOR))" left=$((LIMIT - SECONDS)) began="$SECONDS" code=0
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    ((limit < left)) || limit="$left"
    ((limit > 0)) || { say "$name: left out, no time is left" && return 0; }
    # SIGINT: pytest writes its closing lines, and torchrun ends its ranks.
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1 </dev/null || code=$?
    case "$code" in
    0) say "$name: ok in $((SECONDS - began)) s" ;;
    124 | 137) say "$name: stopped at its limit of $limit s" ;;
    *)
        say "$name: failed with code $code in $((SECONDS - began)) s; its last lines:"
        tail -n 6 "$OUT/logs/$name.log" | cut -c 1-200 | sed 's/^/        /' | tee -a "$OUT/summary.txt"
        ;;
    esac
}

facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
    uname -r
    cat /proc/sys/kernel/yama/ptrace_scope
    df -h /dev/shm /tmp
    "$PYTHON" -m megatron_let.doctor
}

# The recipe, while nvidia-smi writes the GPU's memory to a CSV every second.
recipe() {
    local code=0 sampler=""
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=timestamp,memory.used --format=csv -l 1 >"$OUT/recipe_memory.csv" &
        sampler=$!
    fi
    DATA="$OUT/quickstart/data/train" TEACHER="$TEACHER" OUTPUT="$OUT/recipe" \
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_let.pretrain \
        --config configs/let_1p4b.yaml "$@" --train-iters 12 --lr-warmup-iters 2 \
        --lr-decay-iters 100 --let-stop-step 8 --save-interval 6 --save-retain-interval 6 \
        --eval-iters 0 --log-interval 1 --split 100,0,0 || code=$?
    [[ -z $sampler ]] || kill "$sampler"
    return "$code"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || DRY_RUN=1
kernel=() steps=(--micro-batch-size 16 --microbatches 2 --cycles 4 --steps 4) quickstart=()
model=(--num-layers 6 --micro-batch-size 4 --global-batch-size 8)
if [[ -n $DRY_RUN ]]; then
    say "a dry run at tiny sizes"
    kernel=(--tokens 64 --seconds 0.02 --providers fused eager)
    steps=(--config configs/tiny.yaml --micro-batch-size 1 --microbatches 1 --cycles 2 --steps 1)
    quickstart=(--steps 20)
    model=(--num-layers 3 --hidden-size 64 --num-attention-heads 4 --seq-length 64
        --ffn-hidden-size 176 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 2)
fi
[[ -z ${TEACHER:-} ]] || quickstart+=(--teacher "$TEACHER")
export -f facts recipe
export OUT PYTHON

part facts 120 bash -c facts
part tests 600 "$PYTHON" -m pytest -q -rfE -p no:cacheprovider --junitxml "$OUT/tests.xml" tests/gpu
part kernel 300 "$PYTHON" tools/benchmark/cosine_interp.py "${kernel[@]}" --csv "$OUT/cosine_interp.csv"
step_time=("$PYTHON" tools/benchmark/step_time.py "${steps[@]}")
part step 500 "${step_time[@]}" --csv "$OUT/step_time.csv"
part uncompiled 400 "${step_time[@]}" --csv "$OUT/step_time_uncompiled.csv" --no-let-teacher-compile
part aligned 400 "${step_time[@]}" --csv "$OUT/step_time_5504.csv" --ffn-hidden-size 5504
part quickstart 600 "$PYTHON" tools/quickstart.py "${quickstart[@]}" --output "$OUT/quickstart"
TEACHER="${TEACHER:-$("$PYTHON" -c 'from megatron_let.teacher.package import packaged_teacher
print(packaged_teacher())' 2>/dev/null)}"
export TEACHER
part recipe 300 bash -c 'recipe "$@"' recipe "${model[@]}"
say "done: $OUT"
