"""A model read on one rank and broadcast is the model that each rank would have read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError, raised_on_all_ranks
from megatron_let.teacher import broadcast
from megatron_let.teacher.attention import ARCHITECTURES
from megatron_let.teacher.broadcast import load_on_first_rank
from megatron_let.teacher.head import load_teacher_with_head
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import load_model, load_teacher
from tests.helpers.models import VOCAB_SIZE, save_teacher
from tests.helpers.runs import call_ranks
from tests.unit.teacher import test_attention
from tests.unit.teacher.test_architectures import bert_decoder, gpt1, mpt, multimodal_gemma3

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
NUM_RANKS = 4
TIED = ("gpt2", "opt", "tied llama")
TOKENS = torch.arange(2 * 16).view(2, 16)


def tied_llama(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, **sizes, num_attention_heads=4, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Reads:
    """Counts the weight files that transformers opens to read tensors."""

    def __init__(self) -> None:
        self.count = 0
        self._open = transformers.modeling_utils.safe_open

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._open(*args, **kwargs)


def groups() -> dict[str, Any]:
    """Return the groups of this rank by name: the job, and the second of two stages."""
    second = torch.distributed.new_group([2, 3])
    return {"job": torch.distributed.group.WORLD, "stage": second}


def differences(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[str]:
    """Return the parameters and buffers that are not bitwise equal."""
    first = dict([*ours.named_parameters(), *ours.named_buffers()])
    second = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    assert first.keys() == second.keys()
    return [
        name
        for name, value in second.items()
        if value.dtype != first[name].dtype or not torch.equal(value, first[name])
    ]


def check_models(root: Path) -> None:
    """Compare models with those of a direct load; ranks without the teacher read nothing."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    broadcast._PART_BYTES = 1000  # several parts per tensor
    for name, group in groups().items():
        if rank not in torch.distributed.get_process_group_ranks(group):
            continue
        for folder in sorted(root.iterdir()):
            for dtype in ("fp32", "bf16"):
                check_model(folder, dtype, group, f"{name} {folder.name} {dtype}")


def check_model(folder: Path, dtype: str, group: Any, case: str) -> None:
    config = LETConfig("let", folder, teacher_dtype=dtype)
    found = inspect_teacher(folder)

    def load() -> Any:
        return load_model(found, config, CPU, AutoModelForCausalLM)

    with mock.patch.object(transformers.modeling_utils, "safe_open", Reads()) as reads:
        model = load_on_first_rank(load, CPU, group)
        teacher = load_teacher(found, config, CPU, group=group)
        rows = range(group.rank() * 8, group.rank() * 8 + 8)
        base, head = load_teacher_with_head(found, config, CPU, rows, group=group)
        num_reads = reads.count
    assert (num_reads > 0) == (group.rank() == 0), case
    expected = load()
    assert differences(model, expected) == [], case
    is_tied = [
        m.get_output_embeddings().weight is m.get_input_embeddings().weight
        for m in (model, expected)
    ]
    assert is_tied[0] == is_tied[1] == (folder.name in TIED), case
    alone = load_teacher(found, config, CPU)
    assert torch.equal(teacher.hidden_state(TOKENS), alone.hidden_state(TOKENS)), case
    assert torch.equal(base.hidden_state(TOKENS), alone.hidden_state(TOKENS)), case
    weight = expected.get_output_embeddings().weight[rows.start : rows.stop]
    assert torch.equal(head.weight, weight), case


def check_architectures(root: Path) -> None:
    """Compare the states of teachers; a process that reads nothing registers nothing."""
    torch.distributed.init_process_group("gloo")
    for folder in sorted(root.iterdir()):
        config = LETConfig("let", folder, teacher_dtype="fp32")
        found = inspect_teacher(folder)
        shared = load_teacher(found, config, CPU, group=torch.distributed.group.WORLD)
        state = shared.hidden_state(TOKENS)
        alone = load_teacher(found, config, CPU)
        assert differences(shared._model, alone._model) == [], folder.name
        assert torch.equal(state, alone.hidden_state(TOKENS)), folder.name


def test_state_of_every_architecture_is_bitwise_that_of_each_rank(tmp_path: Path) -> None:
    for name in sorted(ARCHITECTURES):
        test_attention.build(name).save_pretrained(tmp_path / name)
    test_attention.build("qwen2", **test_attention.WINDOWS["qwen2"]).save_pretrained(
        tmp_path / "qwen2 with windows"
    )
    for other in (gpt1, multimodal_gemma3, bert_decoder, mpt):
        other().save_pretrained(tmp_path / other.__name__)
    call_ranks(check_architectures, tmp_path, ranks=2)


def test_broadcast_model_is_bitwise_that_of_each_rank_and_one_rank_reads(tmp_path: Path) -> None:
    for name in ("llama", "opt", "gpt_neox", "gpt2"):
        save_teacher(tmp_path / name, name)
    tied_llama(tmp_path / "tied llama")
    call_ranks(check_models, tmp_path, ranks=NUM_RANKS)


def check_error(folder: Path) -> None:
    """Fail to read on the second stage; every rank of the job raises the reader's error."""
    torch.distributed.init_process_group("gloo")
    group, rank = groups()["stage"], torch.distributed.get_rank()
    config = LETConfig("let", folder, teacher_dtype="fp32")
    with mock.patch.object(transformers.modeling_utils, "safe_open", Reads()) as reads:
        with pytest.raises(LETError) as raised, raised_on_all_ranks(CPU):
            if rank >= 2:
                load_teacher(inspect_teacher(folder), config, CPU, group=group)
        assert (reads.count > 0) == (rank == 2)
    assert raised.value.collective
    messages: list[Any] = [None] * NUM_RANKS
    torch.distributed.all_gather_object(messages, str(raised.value))
    assert len(set(messages)) == 1 and "has no weight for" in messages[0]
    with raised_on_all_ranks(CPU):
        pass


def test_error_of_the_reader_is_raised_on_every_rank_of_the_job(tmp_path: Path) -> None:
    file = save_teacher(tmp_path / "teacher") / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    call_ranks(check_error, file.parent, ranks=NUM_RANKS)
