"""Conversion in both directions by the command, and the inputs that it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_let.checkpoint.convert import MegatronLayout, to_megatron_checkpoint
from megatron_let.checkpoint.formats import iteration_folder, open_checkpoint
from megatron_let.checkpoint.torch_dist import TorchDist
from megatron_let.checkpoint.verify import compare_logits
from megatron_let.checkpoint.weights import MegatronWeights, open_weights
from megatron_let.cli.convert import main
from megatron_let.errors import LETError
from megatron_let.files import atomic
from tests.helpers.checkpoints import (
    as_megatron,
    equal,
    save_llama,
    save_model,
    tensors_of,
    with_tokenizer,
)
from tests.helpers.models import save_teacher

pytestmark = pytest.mark.medium

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa untied": ("llama", {}),
    "mha tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "odd ffn": ("llama", {"intermediate_size": 91}),
    "wide heads": ("llama", {"head_dim": 32}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe tied, dense layers": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
}


@pytest.fixture(autouse=True)
def keep_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hides the GPUs of its process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return with_tokenizer(save_llama(folder, vocab_size=600))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "llama"
    return with_tokenizer(save_llama(folder, 200_000, vocab_size=600))


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """The same model as a Megatron checkpoint."""
    return as_megatron(source, source.with_name("megatron"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Return the exit code and the last line of stderr."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [None, 40_000], ids=["one file", "shards"])
def test_round_trip_is_bitwise(kind: str, shard_bytes: int | None, tmp_path: Path) -> None:
    model, changes = KINDS[kind]
    source = save_model(model, tmp_path / "source", shard_bytes, **changes)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    size = ("--max-shard-size", f"{shard_bytes // 1000}KB") if shard_bytes else ()
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["hf-to-megatron", "--input", str(source), "--output", str(megatron)]) == 0
    assert main(["megatron-to-hf", "--input", str(megatron), "--output", str(back), *size]) == 0
    assert equal(tensors_of(back), tensors_of(source))
    assert main(["verify", str(source), str(back), "--weights-only"]) == 0


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_gpt_model_and_transformers_have_the_same_logits(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Biases, norms and experts of random values; Megatron's loader and modules read the result.
    source = save_model(kind, tmp_path / "source")
    megatron = as_megatron(source, tmp_path / "megatron")
    assert run(capsys, "verify", megatron, source, "--seq-length", 32)[0] == 0
    # The same tensors, wrongly used.
    changes = {"mixtral": {"num_experts_per_tok": 3}, "qwen2": {"rms_norm_eps": 1e-2}}
    _config(source, **changes.get(kind, {"rope_theta": 500.0, "rope_parameters": None}))
    ours, theirs = open_weights(megatron), open_weights(source)
    tokens = torch.arange(32)[None]
    assert compare_logits(ours, theirs, tokens).largest_difference > 1e-3


def test_router_and_experts_of_megatron_are_not_interchanged(tmp_path: Path) -> None:
    source = save_model("qwen3_moe", tmp_path / "source", mlp_only_layers=[0])
    stored = TorchDist(as_megatron(source, tmp_path / "megatron") / "release")
    theirs = tensors_of(source)
    fused = theirs["model.layers.2.mlp.experts.gate_up_proj"]
    name = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    assert torch.equal(stored.read(name), fused) and torch.equal(stored.read(name, (3,)), fused[3])
    assert torch.equal(
        stored.read("decoder.layers.2.mlp.router.weight"), theirs["model.layers.2.mlp.gate.weight"]
    )
    assert stored.tensors()["decoder.layers.0.mlp.linear_fc1.weight"].shape == (2 * 176, 64)


def test_experts_in_one_tensor_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model("mixtral", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    command = ("hf-to-megatron", "--input", tmp_path / "stacked", "--output", tmp_path / "out")
    code, line = run(capsys, *command)
    assert code == 2 and "save_pretrained" in line


def test_export_names_the_rope_factor_that_a_stock_run_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = as_megatron(save_llama(tmp_path / "source"), tmp_path / "megatron") / "release"
    state = TorchDist(checkpoint).state
    vars(state["args"]).update(use_rope_scaling=True, rope_scaling_factor=32.0, train_iters=5)
    torch.save(state, checkpoint / "common.pt")
    command = ("megatron-to-hf", "--input", checkpoint, "--output", tmp_path / "out")
    assert main([str(argument) for argument in command]) == 0
    assert "--rope-scaling-factor is 32.0" in capsys.readouterr().err
    rope = json.loads((tmp_path / "out/config.json").read_text())["rope_scaling"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == 8.0


def _without_transformer_engine(name: str) -> str:
    fused = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
             "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}  # fmt: skip
    for theirs, ours in fused.items():
        name = name.replace(theirs, ours)
    return name


def test_names_without_transformer_engine_are_converted(
    source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    renamed = as_megatron(source, tmp_path / "local", _without_transformer_engine)
    names = TorchDist(renamed / "release").tensors()
    assert "decoder.layers.input_layernorm.weight" in names
    assert (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
        in TorchDist(checkpoint / "release").tensors()
    )
    ours, theirs = open_weights(renamed), open_weights(source)
    for name in tensors_of(source):
        assert torch.equal(ours.read(name), theirs.read(name)), name
    assert ours.unused() == []


def test_padded_rows_are_removed_on_export(source: Path, tmp_path: Path) -> None:
    layout = MegatronLayout(tensor_parallel=2, vocab_divisible_by=128)
    to_megatron_checkpoint(open_weights(source), tmp_path / "padded", layout=layout)
    stored = TorchDist(tmp_path / "padded/release")
    assert stored.tensors()["embedding.word_embeddings.weight"].shape[0] == 768
    back = open_weights(tmp_path / "padded")
    assert back.architecture.vocab_size == 600
    assert torch.equal(
        back.read("model.embed_tokens.weight"),
        open_weights(source).read("model.embed_tokens.weight"),
    )


def test_exported_folder_is_complete(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    output = tmp_path / "out"
    assert main(["megatron-to-hf", "--input", str(checkpoint), "--output", str(output)]) == 0
    theirs = AutoTokenizer.from_pretrained(source)
    ours = AutoTokenizer.from_pretrained(output)
    assert ours("def f(x): return 1").input_ids == theirs("def f(x): return 1").input_ids
    assert GenerationConfig.from_pretrained(output).eos_token_id == theirs.eos_token_id
    config = json.loads((output / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id and config["torch_dtype"] == "float32"


def test_each_tensor_is_read_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = as_megatron(source, source.with_name("once"))
    weights = open_weights(megatron)
    read: list[Any] = []
    original = TorchDist.read
    monkeypatch.setattr(
        TorchDist,
        "read",
        lambda s, *a: read.append(a) or original(s, *a),  # type: ignore[func-returns-value]
    )
    for name in tensors_of(source):
        weights.read(name)
    assert len(read) == len(set(read)) == 4 * 6 + 3


# name -> (a change to a copy of the checkpoint, words of the error)
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "still being written": (lambda f: (f / ".metadata").unlink(), "is still being written"),
    "not finished": (lambda f: (f / "metadata.json").unlink(), "is still being written"),
    "cut short": (lambda f: _cut(f / "__0_0.distcp"), "copy the checkpoint again"),
    "file missing": (lambda f: (f / "__0_0.distcp").unlink(), "is missing; copy"),
    "index damaged": (lambda f: _cut(f / ".metadata"), "cannot be read"),
    "index of an attacker": (lambda f: _poison(f / ".metadata"), "posix.system is not allowed"),
    "old format": (lambda f: _legacy(f), "--ckpt-convert-format torch_dist"),
    "other format": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "has the format 'zarr'",
    ),
    "arguments of an attacker": (lambda f: _poison(f / "common.pt", torch=True), "read safely"),
}


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.marker}",)


def _poison(path: Path, **with_torch: bool) -> None:
    attack = _Attack(path.parent / "attacked")
    if with_torch:
        torch.save({"args": attack}, path)
    else:
        path.write_bytes(pickle.dumps(attack))


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _legacy(folder: Path) -> None:
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00/model_optim_rng.pt").write_bytes(b"")


@pytest.mark.parametrize("what", BROKEN_CHECKPOINTS)
def test_broken_checkpoint_is_refused(
    what: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = BROKEN_CHECKPOINTS[what]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken")) / "release"
    change(folder)
    code, line = run(
        capsys, "megatron-to-hf", "--input", tmp_path / "broken", "--output", tmp_path / "out"
    )
    assert code == 2 and line.startswith("convert: error: ") and words in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"], "something was left behind"
    assert not (folder / "attacked").exists(), "code of the checkpoint was run"


# name -> (a change to a copy of the model, flags, words of the error)
BROKEN_MODELS: dict[str, tuple[Callable[[Path], Any], tuple[object, ...], str]] = {
    "shard missing": (lambda f: next(f.glob("*-of-*")).unlink(), (), "is missing; copy"),
    "shard cut short": (lambda f: _cut(next(f.glob("*-of-*"))), (), "cut short or damaged"),
    "tensor missing": (lambda f: _without_a_tensor(f), (), "has no tensor"),
    "no config": (lambda f: (f / "config.json").unlink(), (), "nor a Hugging Face model"),
    "pickles only": (lambda f: _as_pickle(f), (), "pickle pytorch_model.bin"),
    "a tensor too many": (lambda f: _with_a_tensor(f), (), "not part of a llama model"),
    "another width": (lambda f: _config(f, intermediate_size=99), (), "config.json asks for"),
    "quantised": (
        lambda f: _config(f, quantization_config={"quant_method": "fp8"}),
        (),
        "quantization_config",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").touch(), (), "adapter_config.json"),
    "smaller vocabulary": (lambda f: with_tokenizer(f, 700), (), "700 tokens"),
    "TP that does not divide": (
        lambda f: None, ("--tensor-model-parallel-size", 3), "4 attention heads"
    ),
    "PP that does not divide": (
        lambda f: None, ("--pipeline-model-parallel-size", 3), "4 layers"
    ),
}  # fmt: skip


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without_a_tensor(folder: Path) -> None:
    path = next(folder.glob("*-of-*"))
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def _with_a_tensor(folder: Path) -> None:
    path = next(folder.glob("*-of-*"))
    save_file(load_file(path) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(1)}, path)


def _as_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("what", BROKEN_MODELS)
def test_broken_model_is_refused(
    what: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, flags, words = BROKEN_MODELS[what]
    model = Path(shutil.copytree(sharded, tmp_path / "broken"))
    change(model)
    code, line = run(
        capsys, "hf-to-megatron", "--input", model, "--output", tmp_path / "out", *flags
    )
    assert code == 2 and line.startswith("convert: error: ") and words in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"], "something was left behind"


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "gpt2"])
def test_other_architecture_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_teacher(tmp_path / "model", kind)
    code, line = run(capsys, "hf-to-megatron", "--input", model, "--output", tmp_path / "out")
    assert code == 2 and f"a model of type '{kind}'" in line


def test_tokenizer_of_another_model_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_tokenizer(tmp_path / "tokenizer", 700)
    code, line = run(
        capsys, "megatron-to-hf", "--input", checkpoint, "--output", tmp_path / "out",
        "--tokenizer", other,
    )  # fmt: skip
    assert code == 2 and "700 tokens" in line and not (tmp_path / "out").exists()


def test_run_whose_embedding_was_given_more_rows_is_read(checkpoint: Path) -> None:
    opened = open_checkpoint(iteration_folder(checkpoint))
    rows = dict(opened.tensors())["embedding.word_embeddings.weight"].shape[0]
    size = MegatronWeights(opened, None).architecture.vocab_size
    # As after --padded-vocab-size, or an import that --use-checkpoint-args continued.
    opened.state["args"].make_vocab_size_divisible_by = 1
    opened.state["args"].vocab_size = None
    weights = MegatronWeights(opened, None)
    assert weights.tokenizer is not None and size < rows
    assert weights.architecture.vocab_size == size


def test_existing_output_is_kept_unless_forced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    command = ("megatron-to-hf", "--input", checkpoint, "--output", tmp_path / "out")
    code, line = run(capsys, *command)
    assert code == 2 and "--force" in line and (tmp_path / "out/precious").exists()
    assert run(capsys, *command, "--force")[0] == 0
    assert not (tmp_path / "out/precious").exists() and (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("command", ["megatron-to-hf", "hf-to-megatron"])
@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("run", "contains the input"),
        ("run/checkpoints", "is the input"),
        ("run/checkpoints/", "is the input"),
        ("link", "is the input"),
        ("run/checkpoints/iter_0000001", "is a part of the input"),
        ("run/../run/checkpoints/iter_0000001", "is a part of the input"),
        ("tokenizer", "is the input"),
        (".", "contains the input"),
    ],
)
def test_output_that_overlaps_the_input_is_refused_and_nothing_deleted(
    command: str, output: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "run/checkpoints/iter_0000001/a", tmp_path / "tokenizer/b"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints")
    code, line = run(
        capsys, command, "--input", tmp_path / "run/checkpoints", "--tokenizer",
        tmp_path / "tokenizer", "--output", f"{tmp_path}/{output}", "--force",
    )  # fmt: skip
    assert code == 2 and words in line
    assert all(file.exists() for file in files)


def test_output_that_is_the_tokenizer_of_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_tokenizer(save_llama(tmp_path / "llama", vocab_size=600))
    megatron = as_megatron(source, tmp_path / "megatron")
    code, line = run(capsys, "megatron-to-hf", "--input", megatron, "--output", source, "--force")
    assert code == 2 and "is the input" in line
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tolerance", "nan"], "--tolerance is nan; "),
        (["--tolerance", "-1"], "--tolerance is -1.0; "),
        (["--tolerance", "inf"], "--tolerance is inf; "),
        (["--weights-only", "--data", "pile"], "--data is pile and --weights-only"),
        (["--weights-only", "--num-sequences", "4"], "--num-sequences is 4 and --weights-only"),
        (["--weights-only", "--seq-length", "128"], "--seq-length is 128 and --weights-only"),
    ],
)
def test_flags_of_verify_that_decide_nothing_are_refused(
    flags: list[str], words: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = run(capsys, "verify", source, source, *flags)
    assert code == 2 and words in line


def test_failed_write_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with (
        pytest.raises(RuntimeError),
        atomic.atomic_folder(tmp_path / "old", force=True) as folder,
    ):
        (folder / "half").touch()
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["old"]


def test_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    stored = TorchDist(checkpoint / "release")
    state = stored.state
    state["args"].ffn_hidden_size = 100
    copy = Path(shutil.copytree(checkpoint / "release", tmp_path / "copy"))
    torch.save(state, copy / "common.pt")
    weights = open_weights(copy)
    with pytest.raises(LETError, match="do not belong together"):
        weights.read("model.layers.0.mlp.gate_proj.weight")
