"""Reading a DeepSpeed checkpoint without DeepSpeed."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_let.checkpoint.weights import open_weights
from megatron_let.engines.deepspeed.checkpoint_info import CheckpointInfo, write_info
from megatron_let.engines.deepspeed.checkpoint_reader import ZeroCheckpoint, merge_shards
from megatron_let.errors import LETError


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make importing DeepSpeed fail, as if it were not installed."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


# Shards of tensor-parallel ranks


def state(**patterns: list[str]) -> dict[str, object]:
    info = {"tp_replicated_parameter_patterns": [], "parameter_with_row_parallelism_patterns": []}
    found = {key: [f"^{re.escape(name)}$" for name in names] for key, names in patterns.items()}
    return {"universal_checkpoint_info": info | found, "args": argparse.Namespace(swiglu=True)}


def test_column_shards_are_stacked_in_rank_order() -> None:
    whole = torch.arange(24.0).view(6, 4)
    merged = merge_shards("layers.0.linear_qkv.weight", list(whole.chunk(2)), state())
    assert torch.equal(merged, whole)


def test_row_shards_are_joined_along_the_input() -> None:
    whole, name = torch.arange(24.0).view(6, 4), "layers.0.linear_proj.weight"
    rows = state(parameter_with_row_parallelism_patterns=[name])
    assert torch.equal(merge_shards(name, list(whole.chunk(2, dim=1)), rows), whole)


def test_replicated_parameters_are_taken_once() -> None:
    norm, name = torch.arange(4.0), "layers.0.input_layernorm.weight"
    replicated = state(tp_replicated_parameter_patterns=[name])
    assert torch.equal(merge_shards(name, [norm, norm], replicated), norm)


def test_gate_and_up_shards_are_put_in_order() -> None:
    gate, up = torch.arange(8.0).view(4, 2), torch.arange(8.0, 16.0).view(4, 2)
    shards = [torch.cat(pair) for pair in zip(gate.chunk(2), up.chunk(2), strict=True)]
    merged = merge_shards("layers.0.mlp.linear_fc1.weight", shards, state())
    assert torch.equal(merged, torch.cat([gate, up]))


def test_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LETError, match="is not of --engine deepspeed"):
        ZeroCheckpoint(tmp_path)


# Checkpoints


SHAPES = [
    {"embedding.weight": torch.Size([3, 2]), "layers.0.linear_proj.weight": torch.Size([2, 3])},
    {"layers.0.norm.weight": torch.Size([5])},
]


def tensors_of(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    found = {n: torch.randn(s, generator=generator) for g in SHAPES for n, s in g.items()}
    return found | {"layers.0.norm.weight": torch.arange(5.0)}


def write_zero_3(folder: Path, tp: int, dp: int) -> Path:
    """Write the parts of a ZeRO-3 checkpoint that the reader uses."""
    folder.mkdir()
    write_info(folder, CheckpointInfo(10, 3, dp, tp))
    rows, norm = ["layers.0.linear_proj.weight"], ["layers.0.norm.weight"]
    common = state(
        parameter_with_row_parallelism_patterns=rows, tp_replicated_parameter_patterns=norm
    )
    common["args"] = argparse.Namespace(swiglu=True, params_dtype=torch.float32)
    for rank in range(tp):
        tensors = tensors_of(rank)
        for replica in range(dp):
            flat = []
            for group in SHAPES:
                sizes = {name: -(-shape.numel() // dp) for name, shape in group.items()}
                padded = [
                    torch.nn.functional.pad(
                        tensors[n].flatten(), (0, size * dp - tensors[n].numel())
                    )
                    for n, size in sizes.items()
                ]
                flat.append(torch.cat([whole.chunk(dp)[replica] for whole in padded]))
            name = f"zero_pp_rank_{replica}_mp_rank_{rank:02d}"
            torch.save(common | {"param_shapes": SHAPES}, folder / f"{name}_model_states.pt")
            optimizer = {"optimizer_state_dict": {"fp32_flat_groups": flat}}
            torch.save(optimizer, folder / f"bf16_{name}_optim_states.pt")
    return folder


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_zero_3_pieces_are_merged(tp: int, dp: int, tmp_path: Path) -> None:
    checkpoint = ZeroCheckpoint(write_zero_3(tmp_path / "iter", tp, dp))
    ranks = [tensors_of(rank) for rank in range(tp)]
    expected = {
        "embedding.weight": torch.cat([t["embedding.weight"] for t in ranks]),
        "layers.0.linear_proj.weight": torch.cat(
            [t["layers.0.linear_proj.weight"] for t in ranks], dim=1
        ),
        "layers.0.norm.weight": torch.arange(5.0),
    }
    found = checkpoint.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_wrapper_prefix_is_ignored_in_shard_patterns() -> None:
    norm = torch.arange(4.0)
    for stored, listed in (("a.b", "module.a.b"), ("module.a.b", "a.b")):
        replicated = state(tp_replicated_parameter_patterns=[listed])
        assert torch.equal(merge_shards(stored, [norm, norm], replicated), norm)


def test_missing_shard_is_reported(tmp_path: Path) -> None:
    folder = write_zero_3(tmp_path / "iter", 1, 2)
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(LETError, match="has no zero_pp_rank_1_mp_rank_00_optim_states"):
        ZeroCheckpoint(folder).tensors()


def test_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_zero_3(tmp_path / "iter", 1, 2)
    short = {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(3)]}}
    torch.save(short, folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(LETError, match="are not of one model"):
        ZeroCheckpoint(folder).tensors()


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in the checkpoint ran')",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder = write_zero_3(tmp_path / "iter", 1, 1)
    torch.save({"args": Code()}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(LETError, match="cannot be read safely"):
        ZeroCheckpoint(folder)


def test_universal_checkpoint_error_names_its_source(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    with pytest.raises(LETError, match="give the checkpoint that it was converted from"):
        open_weights(tmp_path)
