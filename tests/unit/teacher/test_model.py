"""The tapped state equals the hidden state that transformers returns, and the teacher is frozen."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    PreTrainedModel,
)

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import Teacher, load_teacher, tapped_layer
from tests.helpers.models import NUM_LAYERS, VOCAB_SIZE, save_teacher

ARCHITECTURES = ("llama", "opt", "gpt_neox", "gpt2")
FINAL_NORM = {
    "llama": "model.norm",
    "opt": "model.decoder.final_layer_norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt2": "transformer.ln_f",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: save_teacher(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **values: Any) -> Teacher:
    values = {"teacher_dtype": "fp32", **values}
    config = LETConfig("let", folder, **values)
    return load_teacher(inspect_teacher(folder), config, CPU)


def causal_model(folder: Path) -> PreTrainedModel:
    """Load the model with its LM head and default attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return embeddings, then the output of each layer; the last one after the final norm."""
    return model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Tapped state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_layer_is_after_final_norm(
    name: str, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    state = load(folders[name]).hidden_state(tokens)
    assert state.shape == (2, 24, 48)
    assert_same(state, hidden_states(causal_model(folders[name]), tokens)[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_layer_without_final_norm_is_the_raw_state(
    name: str, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    model = causal_model(folders[name])
    normed = hidden_states(model, tokens)[-1]
    model.set_submodule(FINAL_NORM[name], torch.nn.Identity())
    raw = hidden_states(model, tokens)[-1]
    state = load(folders[name], teacher_final_norm=False).hidden_state(tokens)
    assert_same(state, raw)
    assert not torch.allclose(raw, normed, atol=0.1), "the final norm of this model is the identity"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("tap", "layer"), [("middle", 1), ("1", 1), ("2", 2)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_earlier_layer_is_never_normalised(
    name: str, tap: str, layer: int, norm: bool, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    teacher = load(folders[name], teacher_layer=tap, teacher_final_norm=norm)
    assert_same(
        teacher.hidden_state(tokens), hidden_states(causal_model(folders[name]), tokens)[layer]
    )


@pytest.mark.parametrize("values", [{}, {"teacher_final_norm": False}, {"teacher_layer": "1"}])
def test_compiled_teacher_gives_same_state(
    values: dict[str, Any],
    folders: dict[str, Path],
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses a backend that counts graphs; the tap must not break compilation."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    expected = load(folders["llama"], **values).hidden_state(tokens)
    assert not graphs
    # The CPU shims disable dynamo in this process.
    with torch._dynamo.config.patch(disable=False):
        teacher = load(folders["llama"], **values, teacher_compile=True)
        first, second = (teacher.hidden_state(rows) for rows in (tokens, tokens.flip(0)))
    assert graphs
    assert_same(first, expected)
    assert_same(second, expected.flip(0))


def test_failed_compilation_is_reported_and_gives_the_uncompiled_state(
    folders: dict[str, Path],
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    expected = load(folders["llama"], teacher_final_norm=False).hidden_state(tokens)
    with torch._dynamo.config.patch(disable=False):
        teacher = load(folders["llama"], teacher_final_norm=False, teacher_compile=True)
        first, second = teacher.hidden_state(tokens), teacher.hidden_state(tokens)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    warnings = [r for r in caplog.records if r.name == "megatron_let.teacher.model"]
    assert len(warnings) == 1 and "no compiler here" in warnings[0].getMessage()


@pytest.mark.parametrize(
    ("value", "device", "sharded", "expected"),
    [
        (None, "cuda", False, True), (None, "cuda", True, False), (None, "cpu", False, False),
        (False, "cuda", False, False), (True, "cpu", False, True),
    ],
)  # fmt: skip
def test_teacher_is_compiled_on_a_gpu_unless_sharded_or_switched_off(
    value: bool | None,
    device: str,
    sharded: bool,
    expected: bool,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Teacher] = []
    monkeypatch.setattr(Teacher, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    sharding = SimpleNamespace(shard=lambda model: model) if sharded else None
    config = LETConfig("let", folders["llama"], teacher_dtype="fp32", teacher_compile=value)
    load_teacher(inspect_teacher(folders["llama"]), config, torch.device(device), sharding)
    assert bool(compiled) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_layer_by_number_equals_last(
    name: str, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    by_number = load(folders[name], teacher_layer=str(NUM_LAYERS)).hidden_state(tokens)
    assert torch.equal(by_number, load(folders[name]).hidden_state(tokens))


@pytest.mark.parametrize("norm", [True, False])
def test_second_call_does_not_depend_on_first(
    norm: bool, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    teacher = load(folders["llama"], teacher_final_norm=norm)
    first = teacher.hidden_state(tokens)
    teacher.hidden_state(tokens.flip(0))
    assert torch.equal(teacher.hidden_state(tokens), first)


@pytest.mark.parametrize(
    ("tap", "layers", "expected"),
    [("last", 12, 12), ("middle", 12, 6), ("middle", 7, 3), ("middle", 1, 1), ("12", 12, 12)],
)
def test_tapped_layer_name_resolves_to_number(tap: str, layers: int, expected: int) -> None:
    assert tapped_layer(tap, layers) == expected


def test_layer_beyond_last_raises() -> None:
    with pytest.raises(LETError, match="--let-teacher-layer is 13"):
        tapped_layer("13", 12)


# Frozen, truncated, no side effects


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_teacher_is_frozen(name: str, folders: dict[str, Path], tokens: torch.Tensor) -> None:
    teacher = load(folders[name])
    assert not teacher.hidden_state(tokens).requires_grad
    assert all(not parameter.requires_grad for parameter in teacher._model.parameters())
    assert not any(module.training for module in teacher._model.modules())


def test_dropout_of_teacher_is_off(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = save_teacher(tmp_path / "gpt2", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    dropout = {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}
    (folder / "config.json").write_text(json.dumps(config | dropout))
    teacher = load(folder)
    assert torch.equal(teacher.hidden_state(tokens), teacher.hidden_state(tokens))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_teacher_has_no_lm_head(name: str, folders: dict[str, Path]) -> None:
    head = causal_model(folders[name]).get_output_embeddings()
    assert head is not None
    teacher = load(folders[name])._model
    assert teacher.get_output_embeddings() is None
    # The input embedding is the only matrix with a row per token of the vocabulary.
    wide = [p for p in teacher.parameters() if p.dim() == 2 and p.shape[0] == VOCAB_SIZE]
    assert len(wide) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_after_tap_are_removed(name: str, folders: dict[str, Path]) -> None:
    whole, cut = load(folders[name]), load(folders[name], teacher_layer="1")
    layers = [m for m in cut._model.modules() if isinstance(m, torch.nn.ModuleList)]
    assert len(layers[0]) == 1
    one_layer = sum(p.numel() * 4 for p in layers[0].parameters())
    assert whole.num_bytes - cut.num_bytes >= (NUM_LAYERS - 1) * one_layer


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dtype_of_weights_and_state_follows_config(
    architecture: str, name: str, dtype: torch.dtype, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    teacher = load(folders[architecture], teacher_dtype=name)
    assert {parameter.dtype for parameter in teacher._model.parameters()} == {dtype}
    assert teacher.hidden_state(tokens).dtype == dtype


def test_state_has_the_dtype_of_the_weights_if_the_model_computes_in_another(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    settings = MambaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4, residual_in_fp32=True
    )
    folder = tmp_path / "mamba"
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    teacher = load(folder, teacher_dtype="bf16")
    assert teacher.hidden_state(tokens).dtype == torch.bfloat16


def test_bf16_state_is_close_to_fp32_state(folders: dict[str, Path], tokens: torch.Tensor) -> None:
    exact = load(folders["llama"]).hidden_state(tokens)
    rounded = load(folders["llama"], teacher_dtype="bf16").hidden_state(tokens).float()
    assert torch.cosine_similarity(exact, rounded, dim=-1).min() > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loading_preserves_random_state(name: str, folders: dict[str, Path]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(folders[name])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tap", ["1", "middle", "last"])
def test_dropped_teacher_is_freed_without_garbage_collection(
    tap: str, norm: bool, folders: dict[str, Path], tokens: torch.Tensor
) -> None:
    teacher = load(folders["llama"], teacher_layer=tap, teacher_final_norm=norm)
    gc.disable()
    try:
        state = teacher.hidden_state(tokens)
        weights = [weakref.ref(parameter) for parameter in teacher._model.parameters()]
        del teacher
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()
    assert state.isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_num_bytes_counts_weights_on_device(name: str, folders: dict[str, Path]) -> None:
    teacher = load(folders[name])
    parameters = sum(p.numel() * p.element_size() for p in teacher._model.parameters())
    assert teacher.width == 48
    assert parameters <= teacher.num_bytes <= parameters + 10_000


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=64, hidden_size=32, num_layers=2, num_heads=4,
                attention_types=[[["global"], 2]],
            )
        ),
    ],
    ids=["bloom", "gpt_neo"],
)  # fmt: skip
def test_model_without_sdpa_uses_its_default_attention(
    model: PreTrainedModel, tmp_path: Path, tokens: torch.Tensor
) -> None:
    """Several causal models in transformers have no SDPA attention."""
    model.save_pretrained(tmp_path)
    state = load(tmp_path).hidden_state(tokens % 64)
    assert_same(state, hidden_states(model.eval(), tokens % 64)[-1])


# Errors


def bert(scale: float) -> BertModel:
    """Return a bidirectional model; large weights imitate a trained one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=64, intermediate_size=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1, torch.float32), (4, torch.float32), (4, torch.bfloat16)],
    ids=["as initialised", "large weights", "large weights in bf16"],
)
def test_bidirectional_model_raises(scale: float, dtype: torch.dtype) -> None:
    with pytest.raises(LETError, match="BertModel is not causal"):
        Teacher(bert(scale).to(dtype), num_layers=2, tap=2, final_norm=True)


def test_causal_architecture_without_causal_mask_raises(folders: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(folders["llama"])
    for layer in model.layers:
        layer.self_attn.is_causal = False
    model._attn_implementation = model.config._attn_implementation = "sdpa"
    without_mask = _without_mask(model)
    with pytest.raises(LETError, match="is not causal"):
        Teacher(without_mask, NUM_LAYERS, NUM_LAYERS, final_norm=True)


def _without_mask(model: PreTrainedModel) -> PreTrainedModel:
    """Make the attention of a Llama cover the whole sequence."""
    for layer in model.layers:
        attend = layer.self_attn.forward

        def forward(*args: Any, attend: Any = attend, **kwargs: Any) -> Any:
            states = kwargs["hidden_states"]
            length = states.shape[1]
            everything = torch.zeros(states.shape[0], 1, length, length, dtype=states.dtype)
            return attend(*args, **kwargs | {"attention_mask": everything})

        layer.self_attn.forward = forward
    return model


def test_model_without_list_of_layers_raises() -> None:
    model = LlamaModel(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
                                   num_attention_heads=4, intermediate_size=64))  # fmt: skip
    with pytest.raises(LETError, match="LlamaModel has no list of 5 layers"):
        Teacher(model, num_layers=5, tap=5, final_norm=True)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama teacher that a test may change."""
    return shutil.copytree(folders["llama"], tmp_path / "copy")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(folder: Path, expected: str) -> None:
    with pytest.raises(LETError, match=expected) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and str(folder) in message, message


def test_missing_weights_of_layer_raise(copy: Path) -> None:
    change_config(copy, num_hidden_layers=4)
    assert_refused(copy, r"layers\.3\.\S+ and 8 more")


def test_single_missing_weight_raises(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(copy, r"layers\.1\.mlp\.up_proj\.weight")


def test_weights_of_other_sizes_raise(copy: Path) -> None:
    change_config(copy, hidden_size=64)
    assert_refused(copy, "its files are of another model|of one model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_reported_as_another_error(copy: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][0] = value

    change_weights(copy, spoil)
    try:
        load(copy)
    except LETError as error:
        assert "NaN or Inf" in str(error), error


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "layers.3.a.weight"])
def test_weight_that_the_model_has_not_raises(name: str, copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({name: torch.ones(48)}))
    assert_refused(copy, "q_proj.bias" if "q_proj" in name else name)


@pytest.mark.parametrize(
    ("architecture", "buffers"),
    [
        ("llama", ("model.layers.0.self_attn.rotary_emb.inv_freq",)),
        ("gpt2", ("h.0.attn.bias", "transformer.h.0.attn.masked_bias")),
        ("gpt_neox", ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias",
                      "gpt_neox.layers.0.attention.rotary_emb.inv_freq")),
    ],
)  # fmt: skip
def test_buffers_of_earlier_transformers_are_accepted(
    architecture: str, buffers: tuple[str, ...], tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "teacher", architecture)
    change_weights(folder, lambda weights: weights.update({b: torch.ones(1) for b in buffers}))
    assert load(folder).width == 48


def test_weights_of_other_output_layers_are_accepted(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({"v_head.weight": torch.ones(48)}))
    assert load(copy).width == 48
