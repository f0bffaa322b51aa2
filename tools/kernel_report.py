"""Report resources and minimal time of the cosine kernels, compiled ahead of time without a GPU.

    python tools/kernel_report.py

Compiles each kernel for sm_80 (A100) and sm_90 (H100) with the tiles of a launch and reads the
machine code: registers, spills, shared memory, widths of loads and stores, instructions. Writes
`cosine_interp_resources.csv`, and the time to move the bytes at peak bandwidth on each GPU to
`cosine_interp_roofline.csv`, in tools/benchmark/results/.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    # Before the imports below, which take seconds.
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of the CSV files")
    FOLDER = parser.parse_args().folder

import torch  # noqa: E402
import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_let.losses import cosine_triton  # noqa: E402
from megatron_let.metrics.provenance import write_csv  # noqa: E402

# (d_M, d_T): the paper's pairs; an equal and a half width; a ratio below 2; a wider teacher.
WIDTHS = [(2048, 576), (2048, 768), (4096, 2048), (2048, 2048), (5120, 4096), (576, 2048)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (tokens, d_M, d_T) of the benchmark.
SHAPES = [(20_480, 2048, 576), (5_120, 4096, 2048), (65_536, 4096, 2048)]


@dataclass(frozen=True)
class Gpu:
    """NVIDIA's data-sheet figures; `sm` is ten times the compute capability."""

    name: str
    sm: int
    bytes_per_second: float
    multiprocessors: int

    @property
    def warp_instructions_per_second(self) -> float:
        """Return four per cycle and multiprocessor, at a clock that both GPUs sustain."""
        return 4 * self.multiprocessors * 1.4e9


GPUS = [Gpu("A100 SXM 80 GB", 80, 2.039e12, 108), Gpu("H100 SXM", 90, 3.35e12, 132)]


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on a GPU of compute capability `sm / 10`."""

    kernel: str
    d_m: int
    d_t: int
    dtype: str
    sm: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: int
    loads_16_byte: int
    stores: int
    stores_16_byte: int
    instructions: int
    warp_instructions_per_token: float


def compile_kernel(plan: cosine_triton.KernelPlan, dtype: str, sm: int) -> bytes:
    """Return the cubin of a plan for aligned tensors of `dtype`."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(plan.kernel.arg_names):
        if name in plan.constants:
            signature[name] = "constexpr"
            constants[(index,)] = plan.constants[name]
            continue
        is_fp32 = name in ("cosine_ptr", "coefficient_ptr") and dtype != "fp64"
        pointer = "*fp32" if is_fp32 else f"*{dtype}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        if name != "num_tokens":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(plan.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": cosine_triton.NUM_WARPS},
    ).asm["cubin"]


def _disassemble(cubin: bytes) -> tuple[str, list[str]]:
    """Return cuobjdump's resource line, and the instructions with their labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for tool, option in (
                (knobs.nvidia.cuobjdump.path, "-res-usage"),
                (knobs.nvidia.nvdisasm.path, "-c"),
            )
        )
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in code.stdout.splitlines()]
    return usage.stdout, [line for line in lines if line.endswith((";", ":"))]


def _executed(lines: list[str], loads_in_loop: int) -> float:
    """Return the instructions that a warp issues, those of a loop once per iteration."""
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    last = max(index for index, line in enumerate(lines) if re.search(r"\bEXIT\b", line))
    total: float = sum(line.endswith(";") for line in lines[: last + 1])
    for index, line in enumerate(lines[:last]):
        target = re.search(r"\bBRA\b.*`\((.+)\)", line)
        start = labels.get(target[1], index) if target else index
        if start < index:
            body = [line for line in lines[start:index] if line.endswith(";")]
            iterations = loads_in_loop / sum("LDG" in line for line in body)
            total += len(body) * (iterations - 1)
    return total


def _loads_in_loop(plan: cosine_triton.KernelPlan, dtype: str) -> int:
    """Return the load instructions of all iterations of a program's loop, if it has one."""
    c = plan.constants
    if "TARGETS" in c:
        return c["TARGETS"] * c["TOKENS"] * c["VECTOR"]
    if plan.kernel is cosine_triton.cosine_forward_block:
        student = c["VECTOR"] * DTYPES[dtype].itemsize // 16
        return triton.cdiv(c["D_M"], c["LANES"] * c["VECTOR"]) * c["TOKENS"] * (student + 1)
    return triton.cdiv(c["D_T"], c["LANES"] * c["VECTOR"]) * c["TOKENS"] * (1 + 2 * c["VECTOR"])


def measure(plan: cosine_triton.KernelPlan, dtype: str, sm: int) -> Resources:
    """Compile a plan and read its machine code."""
    usage, lines = _disassemble(compile_kernel(plan, dtype, sm))
    registers, stack, shared, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "SHARED", "LOCAL")
    )
    code = [line for line in lines if line.endswith(";")]

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in code)

    spilled = stack + local + count(r"\b(LDL|STL)\b")
    issued = _executed(lines, _loads_in_loop(plan, dtype)) * plan.tiles_per_row
    return Resources(
        kernel=plan.kernel.__name__, d_m=plan.constants["D_M"], d_t=plan.constants["D_T"],
        dtype=dtype, sm=sm, registers=registers, spill_bytes=spilled, shared_bytes=shared,
        loads=count(r"\bLDG"), loads_16_byte=count(r"\bLDG\.\S*128"),
        stores=count(r"\bSTG"), stores_16_byte=count(r"\bSTG\.\S*128"), instructions=len(code),
        warp_instructions_per_token=round(issued / plan.constants["TOKENS"], 1),
    )  # fmt: skip


def resources() -> Iterable[Resources]:
    """Measure every kernel of `WIDTHS` in every dtype on every architecture."""
    for d_m, d_t in WIDTHS:
        for dtype, torch_dtype in DTYPES.items():
            student = torch.empty(1, d_m, dtype=torch_dtype, device="meta")
            for plan in (
                cosine_triton.plan_forward(student, d_t),
                cosine_triton.plan_backward(student, d_t),
            ):
                yield from (measure(plan, dtype, gpu.sm) for gpu in GPUS)


def minimal_bytes(tokens: int, d_m: int, d_t: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that each pass must move: inputs, outputs and fp32 numbers per token, once.

    Forward: student and teacher in; cosine and two coefficients out. Backward: student, teacher,
    incoming gradient and the coefficients in; the sum out.
    """
    forward = tokens * ((d_m + d_t) * itemsize + 3 * 4)
    backward = tokens * ((3 * d_m + d_t) * itemsize + 2 * 4)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def roofline(measured: Sequence[Resources]) -> Iterable[dict[str, Any]]:
    """Return the time of each pass's `minimal_bytes` at peak bandwidth, in bf16.

    The issue fraction is the time to issue the kernel's instructions over that time: below 1, the
    kernel is limited by memory bandwidth.
    """
    for tokens, d_m, d_t in SHAPES:
        for name, size in list(minimal_bytes(tokens, d_m, d_t, 2).items())[:2]:
            row = {"tokens": tokens, "d_m": d_m, "d_t": d_t, "dtype": "bf16", "pass": name}
            row["bytes"] = size
            for gpu in GPUS:
                (issued,) = (
                    r.warp_instructions_per_token
                    for r in measured
                    if (r.d_m, r.d_t, r.dtype, r.sm) == (d_m, d_t, "bf16", gpu.sm)
                    and name in r.kernel
                )
                seconds = size / gpu.bytes_per_second
                row[f"{gpu.name} ms"] = round(seconds * 1e3, 4)
                issue_seconds = tokens * issued / gpu.warp_instructions_per_second
                row[f"{gpu.name} issue fraction"] = round(issue_seconds / seconds, 2)
            yield row


def main(folder: Path) -> None:
    """Measure, and write both CSV files to `folder`."""
    stamp = {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "date": datetime.now(UTC).date().isoformat(),
    }
    measured = list(resources())
    write_csv(folder / "cosine_interp_resources.csv", [asdict(row) for row in measured], stamp)
    write_csv(folder / "cosine_interp_roofline.csv", list(roofline(measured)), {})


if __name__ == "__main__":
    main(FOLDER)
