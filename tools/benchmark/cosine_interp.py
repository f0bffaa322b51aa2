"""Measure time, and memory on a GPU, of the cosine loss against other implementations.

    python tools/benchmark/cosine_interp.py                 # on a GPU: the paper's shapes
    python tools/benchmark/cosine_interp.py --tokens 4096   # on a CPU: reference and eager torch

The pass `forward` computes the cosine per token; `both` also computes the sum of the incoming
gradient and the loss's, as the hook does in the backward of each microbatch. Providers:

    fused     megatron_let.losses.cosine: a Triton kernel on a GPU, the reference on a CPU
    eager     F.interpolate and F.cosine_similarity in fp32, with autograd
    compiled  eager under torch.compile
    modelopt  nvidia-modelopt's HiddenStateCosineLoss with its linear projection, if installed

Rows are appended to tools/benchmark/results/cosine_interp.csv. A GPU's bandwidth counts the fewest
bytes that a pass can move (`minimal_bytes`), next to a device-to-device copy of as many bytes
measured in the same run. Inputs are random, and several sets are rotated so that they do not stay
in a cache. Every provider but modelopt, whose projection is another function, is first compared
with the tests' fp64 reference. The gradient of modelopt's projection is left out of its time.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch._dynamo
from common import RESULTS_FOLDER
from kernel_report import DTYPES, SHAPES, minimal_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from megatron_let.doctor.check import version_of
from megatron_let.losses.cosine import cosine_loss, token_cosine
from megatron_let.metrics.provenance import processor
from tests.helpers.exact_cosine import exact_cosine, exact_gradient, relative_error

RESULTS = RESULTS_FOLDER / "cosine_interp.csv"
Differentiable = Callable[[Tensor, Tensor], Tensor]
PASSES = ("forward", "both")
QUANTILES = (0.2, 0.5, 0.8)
# The loss is -SCALE * cos, summed over tokens.
SCALE = 0.1
CHECKED_TOKENS = 64


@dataclass
class Inputs:
    """Student, teacher, and the incoming gradient of the student."""

    student: Tensor
    teacher: Tensor
    incoming: Tensor


@dataclass
class Provider:
    """An implementation: `forward` gives the cosine, `both` the summed gradient and the cosine."""

    forward: Callable[[Inputs], Tensor]
    both: Callable[[Inputs], tuple[Tensor, Tensor]]


def fused(device: str) -> Provider:
    scale = torch.tensor(SCALE, dtype=torch.float64, device=device)

    def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
        gradient, values = cosine_loss(inputs.student, inputs.teacher, scale, inputs.incoming)
        return gradient, values[0]

    return Provider(lambda inputs: token_cosine(inputs.student, inputs.teacher), both)


def by_autograd(cosine: Differentiable) -> Provider:
    """Return the provider of a cosine that autograd differentiates."""

    def forward(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return cosine(inputs.student, inputs.teacher)

    def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
        student = inputs.student.detach().requires_grad_()
        value = cosine(student, inputs.teacher)
        # The other branch: the gradient that the next layer sends back.
        outputs = student.view_as(student), value
        gradients = inputs.incoming, torch.full_like(value, -SCALE)
        return torch.autograd.grad(outputs, student, gradients)[0], value.detach()

    return Provider(forward, both)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    wide = F.interpolate(
        student.float()[:, None], size=teacher.shape[1], mode="linear", align_corners=True
    )
    return F.cosine_similarity(wide[:, 0], teacher.float(), dim=-1)


def modelopt_cosine(d_m: int, d_t: int, dtype: torch.dtype, device: str) -> Differentiable | None:
    """Return ModelOpt's loss over a projection of the same dtype, or None with a printed reason."""
    try:
        from modelopt.torch.distill.plugins.megatron import HiddenStateCosineLoss
    except ImportError as error:
        print(f"modelopt skipped: {error}; pip install nvidia-modelopt to include it")
        return None
    projection = nn.Linear(d_m, d_t, device=device, dtype=dtype)
    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    loss = HiddenStateCosineLoss(config, projection_layer=projection)

    def cosine(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = loss(student[:, None], teacher[:, None])[0]
        return 1 - value[0]

    return cosine


def make_provider(
    name: str, d_m: int, d_t: int, dtype: torch.dtype, device: str
) -> Provider | None:
    if name == "fused":
        return fused(device)
    if name == "modelopt":
        cosine = modelopt_cosine(d_m, d_t, dtype, device)
        return None if cosine is None else by_autograd(cosine)
    if name == "compiled":
        torch._dynamo.reset()  # earlier shapes would exhaust the recompile limit
        return by_autograd(torch.compile(eager, dynamic=False))
    return by_autograd(eager)


def make_inputs(
    tokens: int, d_m: int, d_t: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def random(width: int) -> Tensor:
        return torch.randn(tokens, width, device=device, generator=generator).to(dtype)

    return Inputs(random(d_m), random(d_t), random(d_m))


def make_pass(name: str, provider: Provider, sets: Sequence[Inputs]) -> Callable[[], Any]:
    """Return a function that runs one pass over the next set of inputs."""
    turn = itertools.cycle(sets)
    run: Callable[[Inputs], Any] = getattr(provider, name)
    return lambda: run(next(turn))


def errors(provider: Provider, inputs: Inputs) -> tuple[float, float]:
    """Return the largest cosine error and the gradient's relative error against fp64."""
    rows = slice(CHECKED_TOKENS)
    few = Inputs(inputs.student[rows], inputs.teacher[rows], inputs.incoming[rows])
    gradient, cosine = provider.both(few)
    student, teacher = few.student.cpu(), few.teacher.cpu()
    weight = torch.full((len(student),), -SCALE, dtype=torch.float64)
    expected = few.incoming.cpu().double() + exact_gradient(student, teacher, weight)
    difference = (cosine.cpu().double() - exact_cosine(student, teacher)).abs()
    return float(difference.max()), relative_error(gradient.cpu(), expected)


def time_on_gpu(function: Callable[[], Any], seconds: float) -> list[float]:
    """Return milliseconds at `QUANTILES`, by device events."""
    from triton.testing import do_bench

    result = do_bench(
        function, warmup=int(seconds * 250), rep=int(seconds * 1e3), quantiles=list(QUANTILES)
    )
    return list(result)


def time_on_cpu(function: Callable[[], Any], seconds: float) -> list[float]:
    """Return milliseconds at `QUANTILES`.

    CPU time summed over threads, which other work on the machine hardly affects.
    """
    timer = Timer(
        "function()",
        globals={"function": function},
        timer=time.process_time,
        num_threads=torch.get_num_threads(),
    )
    times = timer.blocked_autorange(min_run_time=seconds).times
    return [1e3 * float(value) for value in np.quantile(times, QUANTILES)]


def peak_on_gpu(function: Callable[[], Any]) -> int:
    """Return the bytes allocated at the peak of a run beyond those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(size: int, seconds: float) -> float:
    """Return GB/s of a device-to-device copy that reads and writes `size` bytes together."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return size / time_on_gpu(lambda: target.copy_(source), seconds)[1] / 1e6


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per shape, dtype, provider and pass that the arguments select."""
    device = arguments.device
    shapes = {(arguments.tokens or tokens, d_m, d_t) for tokens, d_m, d_t in SHAPES}
    for (tokens, d_m, d_t), dtype in itertools.product(sorted(shapes), arguments.dtypes):
        itemsize = DTYPES[dtype].itemsize
        input_bytes = tokens * (2 * d_m + d_t) * itemsize
        num_sets = 2
        if device == "cuda":
            num_sets += 2 * torch.cuda.get_device_properties(0).L2_cache_size // input_bytes
        sets = [
            make_inputs(tokens, d_m, d_t, DTYPES[dtype], device, seed) for seed in range(num_sets)
        ]
        for name in arguments.providers:
            provider = make_provider(name, d_m, d_t, DTYPES[dtype], device)
            if provider is None:
                continue
            for which in PASSES:
                run = make_pass(which, provider, sets)
                result_bytes = tokens * d_m * itemsize if which != "forward" else 0
                memory = memory_columns(run, device, result_bytes, input_bytes)
                wrong = (None, None) if name == "modelopt" else errors(provider, sets[0])
                moved = minimal_bytes(tokens, d_m, d_t, itemsize)[which]
                speed = speed_columns(run, device, moved, arguments.seconds)
                yield {
                    "tokens": tokens, "d_m": d_m, "d_t": d_t, "dtype": dtype, "pass": which,
                    "provider": name, **speed, "cosine_error": wrong[0], "gradient_error": wrong[1],
                    **memory,
                }  # fmt: skip


def speed_columns(
    run: Callable[[], Any], device: str, moved_bytes: int, seconds: float
) -> dict[str, Any]:
    fraction = None
    if device == "cuda":
        low, middle, high = time_on_gpu(run, seconds)
        copied = copy_bandwidth(moved_bytes, seconds)
        fraction = round(moved_bytes / middle / 1e6 / copied, 3)
    else:
        low, middle, high = time_on_cpu(run, seconds)
    return {
        "p20_ms": round(low, 4), "p50_ms": round(middle, 4), "p80_ms": round(high, 4),
        "gb_per_s": round(moved_bytes / middle / 1e6, 1), "fraction_of_copy": fraction,
    }  # fmt: skip


def memory_columns(
    run: Callable[[], Any], device: str, result_bytes: int, input_bytes: int
) -> dict[str, Any]:
    """Return the memory of a pass beyond its inputs and the gradient it returns."""
    if device == "cpu":
        return {"extra_bytes": None, "extra_of_inputs": None}
    run()  # exclude what the first run compiles and loads
    extra = max(0, peak_on_gpu(run) - result_bytes)
    return {"extra_bytes": extra, "extra_of_inputs": round(extra / input_bytes, 4)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to the file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def parse_arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    providers = ["fused", "eager", "compiled", "modelopt"] if gpu else ["fused", "eager"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, help="number of tokens of every shape")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument(
        "--providers", nargs="+", default=providers,
        choices=["fused", "eager", "compiled", "modelopt"],
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="seconds of measurement per number"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    stamp = {
        "machine": machine(arguments.device), "torch": torch.__version__,
        "triton": version_of("triton"), "modelopt": version_of("nvidia-modelopt"),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    for row in rows(arguments):
        known = {name: value for name, value in (row | stamp).items() if value is not None}
        print(known, flush=True)
        append(arguments.csv, row | stamp)


if __name__ == "__main__":
    main()
