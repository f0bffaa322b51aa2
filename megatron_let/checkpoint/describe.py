"""What a checkpoint of either engine holds, without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_let.checkpoint.parameter_mapping import EXTRA_STATES, EXTRA_STATES_ONCE, PROJECTION
from megatron_let.checkpoint.torch_dist import TorchDist, iteration_folder
from megatron_let.engines.deepspeed.export import ZeroCheckpoint, is_zero_checkpoint

_LAYOUT = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("DP", "data_parallel_size"),
)
# What a GPT model, its run and its optimizer write; anything else is named.
_EXPECTED = ("embedding.", "decoder.", "output_layer.")
_STATES = ("common_state", "rng_state", "rerun_state_machine_state", *EXTRA_STATES,
           *EXTRA_STATES_ONCE, f"{PROJECTION}_")  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint, for people and for JSON.

    Raises:
        LETError: not a whole checkpoint.
    """
    folder = iteration_folder(path)
    return _describe_zero(folder) if is_zero_checkpoint(folder) else _describe_torch_dist(folder)


def _describe_torch_dist(folder: Path) -> dict[str, Any]:
    checkpoint = TorchDist(folder)
    facts = _facts(folder, checkpoint.common_state(), checkpoint.tensors())
    return facts | {
        "engine": "megatron",
        "let_projection": checkpoint.projection_shape(),
        "optimizer_tensors": len(checkpoint.optimizer_names()),
        "not_of_a_gpt_model": foreign_entries(checkpoint),
    }


def _describe_zero(folder: Path) -> dict[str, Any]:
    checkpoint = ZeroCheckpoint(folder)
    tensors = checkpoint.tensors()
    return _facts(folder, checkpoint.state, tensors) | {
        "engine": f"deepspeed, ZeRO-{checkpoint.info.zero_stage}",
        "optimizer_files": len(list(folder.glob("*_optim_states.pt"))),
        "not_of_a_gpt_model": sorted(n for n in tensors if not n.startswith(_EXPECTED)),
    }


def _facts(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of either engine's checkpoint."""
    args: dict[str, Any] = vars(state["args"]) if state.get("args") is not None else {}
    dtypes = sorted({str(t.properties.dtype).removeprefix("torch.") for t in tensors.values()})
    return {
        "folder": str(folder),
        "iteration": state.get("iteration"),
        "consumed_samples": args.get("consumed_train_samples"),
        "consumed_tokens": _tokens(args),
        "layout": {label: args.get(name) or 1 for label, name in _LAYOUT},
        "parameters_with_padding": sum(t.size.numel() for t in tensors.values()),
        "dtypes": dtypes,
        "tensors": {name: list(t.size) for name, t in sorted(tensors.items())},
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "let": {k: _plain(v) for k, v in sorted(args.items()) if k.startswith("let_")},
    }


def _tokens(args: Mapping[str, Any]) -> int | None:
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    return None if samples is None or length is None else int(samples) * int(length)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def foreign_entries(checkpoint: TorchDist) -> list[str]:
    """Entries that belong neither to a GPT model nor to its run: a teacher would be among them."""
    own = (*_EXPECTED, *_STATES)
    optimizer = set(checkpoint.optimizer_names())
    names = checkpoint.metadata.state_dict_metadata
    return sorted(n for n in names if n not in optimizer and not n.startswith(own))
