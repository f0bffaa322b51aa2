"""What the benchmarks share: paths, teachers, runs of the entry and provenance."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS_FOLDER = ROOT / "tools" / "benchmark" / "results"
# A script that is started by its path finds only its own folder.
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from megatron_let.cli.common import command_line  # noqa: E402
from megatron_let.compat.device import Host  # noqa: E402
from megatron_let.metrics.provenance import provenance  # noqa: E402
from megatron_let.planner.sizes import TransformerSize  # noqa: E402

CPU = Host(cuda=False, transformer_engine=False, fused_gradients=False)


def source() -> dict[str, str]:
    """Return the provenance of the running script's numbers."""
    return provenance(command_line())


def llama_config(size: TransformerSize, **others: Any) -> Any:
    """Return transformers' `LlamaConfig` of these sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        tie_word_embeddings=size.tied,
        **others,
    )


def save_teacher(folder: Path, size: TransformerSize, max_position_embeddings: int) -> Path:
    """Save a random Llama of these sizes in bf16; return the folder."""
    from transformers import LlamaForCausalLM

    config = llama_config(size, max_position_embeddings=max_position_embeddings)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def run_entry(program: list[str], ranks: int, **variables: str) -> str:
    """Run a program (`-m MODULE` or a file, and flags) with torchrun, and return its output.

    Exit with the end of the output if it fails. `variables` are of the environment.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), *program],
        env={**os.environ, "PYTHONPATH": path, **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if run.returncode:
        sys.exit(f"{' '.join(program)} failed:\n{run.stdout[-4000:]}")
    return run.stdout
