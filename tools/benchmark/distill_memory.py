"""Measure peak memory of distilling the teacher's logits, for the paper's 1.4B on one of 32 GPUs.

Megatron's model and losses run one microbatch, forward and backward, under fake tensors: every
allocation is counted and none is made, so a machine without a GPU measures the real shapes. fp32
gradients and this rank's 1/32 of the optimizer are counted too. Methods:

    baseline   Megatron's cross entropy
    rkd        this package's distilled cross entropy
    naive      student's and teacher's logits in fp32, softmax, KL divergence by torch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS_FOLDER, llama_config, source
from fake_training import join, prepare_megatron
from peak_memory import PeakMemory
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_let.metrics.provenance import write_csv
from megatron_let.planner.sizes import TEACHERS

RESULTS = RESULTS_FOLDER / "distill_memory.csv"
VOCABULARY = 49_152
# Bytes of the distributed optimizer per parameter: fp32 weights and two moments, over 32 ranks.
OPTIMIZER_BYTES = 12 / 32
WEIGHT = 0.5
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> int:
    """Measure, print a table, write the CSV; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=1280)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file to write")
    options = parser.parse_args()
    prepare_megatron()
    join(0, 1)
    peaks = {name: _peak(name, options) for name in ("baseline", "rkd", "naive")}
    rows = [
        {
            "method": name,
            "num_layers": options.num_layers,
            "micro_batch_size": options.micro_batch_size,
            "seq_length": options.seq_length,
            "peak_gib": round(peak / 2**30, 3),
            "ratio": round(peak / peaks["baseline"], 4),
        }
        for name, peak in peaks.items()
    ]
    _print(rows)
    write_csv(options.csv, rows, source())
    return 0


def _student(options: argparse.Namespace) -> Any:
    """Build the paper's 1.4B model in bf16."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_let.compat.local_layers import local_layer_spec

    config = TransformerConfig(
        num_layers=options.num_layers, hidden_size=2048, ffn_hidden_size=5461,
        num_attention_heads=32, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        bf16=True, params_dtype=torch.bfloat16, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, perform_initialization=False,
    )  # fmt: skip
    holder: Any = SimpleNamespace(transformer=config)
    torch.set_default_dtype(torch.bfloat16)  # the norms' weights ignore params_dtype
    model = GPTModel(
        config, local_layer_spec(holder), VOCABULARY, options.seq_length,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    return model


def _peak(name: str, options: argparse.Namespace) -> int:
    """Return the bytes at the peak of one microbatch."""
    with FakeTensorMode(), PeakMemory() as memory:
        student = _student(options)
        size = sum(parameter.numel() for parameter in student.parameters())
        kept = [torch.empty(size), torch.empty(int(size * OPTIMIZER_BYTES), dtype=torch.uint8)]
        shape = (options.micro_batch_size, options.seq_length)
        tokens = torch.zeros(shape, dtype=torch.int64)
        if name != "baseline":
            student.compute_language_model_loss = _teacher_loss(name, tokens)
        positions = torch.arange(shape[1]).expand(shape)
        student(tokens, positions, None, labels=tokens).sum().backward()
        del kept
    return memory.peak


def _teacher_loss(name: str, tokens: Tensor) -> Loss:
    """Return the method's replacement of `compute_language_model_loss`, with a new teacher."""
    from transformers import AutoModel

    config = llama_config(TEACHERS["smollm2-135m"])
    teacher = AutoModel.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    head = teacher.embed_tokens.weight

    def state() -> Tensor:
        with torch.no_grad():
            return teacher(input_ids=tokens, use_cache=False).last_hidden_state.transpose(0, 1)

    return _rkd(state, head) if name == "rkd" else _naive(state, head)


def _rkd(state: Callable[[], Tensor], head: Tensor) -> Loss:
    from megatron.core import parallel_state

    from megatron_let.losses.distilled_cross_entropy import SoftTargets, distilled_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    targets = SoftTargets(lambda hidden: F.linear(hidden, head), 0, WEIGHT, 1.0, 0, group)

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        return distilled_cross_entropy(logits, labels.T.contiguous(), state(), targets)[0].T

    return loss


def _naive(state: Callable[[], Tensor], head: Tensor) -> Loss:
    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        targets = F.linear(state(), head).float().softmax(-1)
        log_probabilities = logits.float().log_softmax(-1)
        hard = F.nll_loss(log_probabilities.flatten(0, 1), labels.T.flatten(), reduction="none")
        soft = -(targets * log_probabilities).sum(-1).flatten()
        return (1 - WEIGHT) * hard + WEIGHT * soft

    return loss


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "peak GiB", "relative to baseline")
    for row in rows:
        table.add_row(row["method"], f"{row['peak_gib']:.2f}", f"{row['ratio']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
