"""Report resources and minimal time of the cosine kernel, compiled ahead of time without a GPU.

    python tools/kernel_report.py

Compiles the kernel for sm_80 (A100) and sm_90 (H100) with the tiles of a launch and reads the
machine code: registers, spills, shared memory, widths of loads and stores. Writes
`cosine_interp_resources.csv`, and the time to move the bytes at peak bandwidth on each GPU to
`cosine_interp_roofline.csv`, in tools/benchmark/results/.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    # Before the imports below, which take seconds.
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()

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
# Ten times the compute capability, and bytes/s of NVIDIA's data sheet.
GPUS = {"A100 SXM 80 GB": (80, 2.039e12), "H100 SXM": (90, 3.35e12)}


def compile_kernel(plan: dict[str, Any], dtype: str, sm: int) -> bytes:
    """Return the cubin of a plan for aligned tensors of `dtype`."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(cosine_triton.cosine_kernel.arg_names):
        if name in plan:
            signature[name] = "constexpr"
            constants[(index,)] = plan[name]
            continue
        is_fp32 = name == "cosine_ptr" and dtype != "fp64"
        pointer = "*fp64" if name == "scale_ptr" else "*fp32" if is_fp32 else f"*{dtype}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        if name != "num_tokens":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(cosine_triton.cosine_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": cosine_triton.NUM_WARPS},
    ).asm["cubin"]


def _disassemble(cubin: bytes) -> tuple[str, list[str]]:
    """Return cuobjdump's resource line, and the instructions."""
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
    return usage.stdout, [line for line in lines if line.endswith(";")]


def measure(plan: dict[str, Any], dtype: str, sm: int) -> dict[str, Any]:
    """Compile a plan for compute capability `sm / 10`, and read the resources in its code."""
    usage, code = _disassemble(compile_kernel(plan, dtype, sm))
    registers, stack, shared, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "SHARED", "LOCAL")
    )

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in code)

    spilled = stack + local + count(r"\b(LDL|STL)\b")
    return {
        "kernel": "cosine_block" if plan["BLOCK"] else "cosine_gather",
        "d_m": plan["D_M"], "d_t": plan["D_T"],
        "dtype": dtype, "sm": sm, "registers": registers, "spill_bytes": spilled,
        "shared_bytes": shared, "loads": count(r"\bLDG"), "loads_16_byte": count(r"\bLDG\.\S*128"),
        "stores": count(r"\bSTG"), "stores_16_byte": count(r"\bSTG\.\S*128"),
        "instructions": len(code),
    }  # fmt: skip


def resources() -> Iterable[dict[str, Any]]:
    """Measure the kernel for `WIDTHS` in every dtype on every architecture."""
    for d_m, d_t in WIDTHS:
        for dtype, torch_dtype in DTYPES.items():
            student = torch.empty(1, d_m, dtype=torch_dtype, device="meta")
            plan = cosine_triton.plan(student, d_t)
            yield from (measure(plan, dtype, sm) for sm, _ in GPUS.values())


def minimal_bytes(tokens: int, d_m: int, d_t: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that a pass must move: inputs, outputs and a cosine in fp32, once each.

    `forward`, the cosine alone: student and teacher in. `both`: student, teacher and incoming
    gradient in, the sum out.
    """
    forward = tokens * ((d_m + d_t) * itemsize + 4)
    return {"forward": forward, "both": forward + tokens * 2 * d_m * itemsize}


def roofline() -> Iterable[dict[str, Any]]:
    """Return the time of `minimal_bytes` of both passes at peak bandwidth, in bf16."""
    for tokens, d_m, d_t in SHAPES:
        size = minimal_bytes(tokens, d_m, d_t, 2)["both"]
        row = {"tokens": tokens, "d_m": d_m, "d_t": d_t, "dtype": "bf16", "bytes": size}
        yield row | {f"{gpu} ms": round(size / rate * 1e3, 4) for gpu, (_, rate) in GPUS.items()}


def main() -> None:
    """Measure, and write both CSV files."""
    stamp = {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_csv(RESULTS / "cosine_interp_resources.csv", list(resources()), stamp)
    write_csv(RESULTS / "cosine_interp_roofline.csv", list(roofline()), {})


if __name__ == "__main__":
    main()
