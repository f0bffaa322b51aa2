"""Model folders may hold Python code, which no command runs or asks about."""

from __future__ import annotations

import ast
import io
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.data.text_tokenizer import load_hugging_face
from megatron_let.errors import LETError
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import from_pretrained
from megatron_let.teacher.tokenizer import read_tokenizer
from tests.helpers.checkpoints import save_llama
from tests.helpers.runs import ROOT

CODE = "import pathlib\npathlib.Path('{marker}').touch()\nclass Custom: pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose config and tokenizer are code, while somebody answers yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    model = save_llama(tmp_path / "model")
    (model / "code.py").write_text(CODE.format(marker=tmp_path / "ran"))
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Custom"}}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["code.Custom", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return model


@pytest.mark.parametrize("load", [inspect_teacher, read_tokenizer, load_hugging_face])
def test_code_in_a_folder_is_refused_and_not_run(load: object, folder: Path) -> None:
    with pytest.raises(LETError) as error:
        load(folder)  # type: ignore[operator]
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (folder.parent / "ran").exists()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_pickled_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(LETError, match=f"{folder} are .*a pickle with code") as error:
        from_pretrained(folder, None, AutoModelForCausalLM)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_code_would_run_without_the_argument(folder: Path) -> None:
    with pytest.raises(Exception, match="Custom"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (folder.parent / "ran").exists()


def test_every_call_of_from_pretrained_forbids_code() -> None:
    for path in (ROOT / "megatron_let").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            if isinstance(node, ast.Call) and getattr(function, "attr", "") == "from_pretrained":
                names = {keyword.arg for keyword in node.keywords}
                assert names & {"trust_remote_code", None}, f"{path}:{node.lineno}"
