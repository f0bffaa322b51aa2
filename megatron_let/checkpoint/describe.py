"""Describe a checkpoint without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.checkpoint.formats import iteration_folder, open_checkpoint
from megatron_let.checkpoint.parameter_mapping import PROJECTION

_LAYOUT = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("DP", "data_parallel_size"),
)
# Entries of a GPT model and its run; any other is reported.
_EXPECTED = ("embedding.", "decoder.", "mtp.", "output_layer.", "common_state", "rng_state",
             "rerun_state_machine_state", f"{PROJECTION}_")  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """Return facts about a checkpoint, as values that JSON can represent.

    Entries under `not_of_a_gpt_model` belong neither to a GPT model nor to its run; a teacher's
    would be among them.

    Raises:
        LETError: not a complete checkpoint.
    """
    folder = iteration_folder(path)
    checkpoint = open_checkpoint(folder)
    state, tensors = checkpoint.state, checkpoint.tensors()
    args: dict[str, Any] = vars(state["args"]) if state.get("args") is not None else {}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return {
        "folder": str(folder),
        "iteration": state.get("iteration"),
        "consumed_samples": args.get("consumed_train_samples"),
        "consumed_tokens": consumed_tokens(args),
        "layout": {label: args.get(name) or 1 for label, name in _LAYOUT},
        "parameters_with_padding": sum(t.numel() for t in tensors.values()),
        "dtypes": dtypes,
        "tensors": {name: list(t.shape) for name, t in sorted(tensors.items())},
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "let": {k: _plain(v) for k, v in sorted(args.items()) if k.startswith("let_")},
        **checkpoint.facts(),
        "not_of_a_gpt_model": sorted(
            name for name in checkpoint.entries() if not name.startswith(_EXPECTED)
        ),
    }


def consumed_tokens(args: Mapping[str, Any]) -> int | None:
    """Return the tokens that a run had trained on, from its arguments; None if unknown."""
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    return None if samples is None or length is None else int(samples) * int(length)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
