"""LET with a teacher that has another tokenizer, through the real entry."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.data import write_indexed
from tests.helpers.deepspeed import needs_deepspeed
from tests.helpers.runs import Run, largest_difference, train

pytestmark = pytest.mark.distributed

KEYS = ("lm_loss", "let_cosine", "grad_norm")
WORDS = ("the", "late", "layer", "of", "a", "small", "teacher", "pulls", "an", "early", "student")


def documents() -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(20, 90))) for _ in range(150)]


def save_tokenizer(folder: Path, merges: int) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer with this many merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    return fast


def save_teacher(folder: Path, merges: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, merges)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte tokenizer of the student, its data, and teachers with that and another tokenizer."""
    root = tmp_path_factory.mktemp("cross")
    write_indexed(root / "data", documents(), save_tokenizer(root / "student", 0))
    save_teacher(root / "same", 0)
    save_teacher(root / "other", 40)
    return root


def run(folder: Path, output: Path, teacher: str, *flags: object, ranks: int = 1) -> Run:
    return train(
        output, "--data-path", folder / "data", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", folder / "student", "--train-iters", 4,
        "--make-vocab-size-divisible-by", 128,
        "--eval-iters", 0, "--let-weight", 1.0, "--let-stop-step", 10, *flags,
        ranks=ranks, TEACHER=str(folder / teacher),
    )  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="whole rows"),
        pytest.param(
            ("--reset-position-ids", "--reset-attention-mask"),
            id="documents",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_tokenizer_matches_run_without_the_flag(
    flags: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """Samples of bytes are not split inside a token, so both runs read the same tokens."""
    plain = run(folder, tmp_path / "plain", "same", *flags)
    aligned = run(folder, tmp_path / "aligned", "same", "--let-cross-tokenizer", *flags)
    for key in KEYS:
        assert largest_difference(aligned, plain, key) < 1e-5, key


def test_layouts_and_workers_match_one_process(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    run(folder, tmp_path / "start", "same", "--save", weights, "--save-interval", 4)
    start = ("--let-cross-tokenizer", "--load", weights, "--finetune", "--no-load-optim",
             "--no-load-rng")  # fmt: skip
    expected = run(folder, tmp_path / "one", "other", *start)
    assert len(expected.steps) == 4
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel",
              "--pipeline-model-parallel-size", 2)  # fmt: skip
    found = run(
        folder, tmp_path / "four", "other", *start, *layout,
        "--make-vocab-size-divisible-by", 64, "--num-workers", 1,
        # The only placement that reads ahead; the last stage's loader must not need to.
        "--let-placement", "bubble", ranks=4,
    )  # fmt: skip
    for key in KEYS:
        assert largest_difference(found, expected, key) < 1e-5, key


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_engine_reads_both_tokenizers(folder: Path, tmp_path: Path) -> None:
    flag = "--let-cross-tokenizer"
    expected = run(folder, tmp_path / "megatron", "other", flag, ranks=2)
    found = run(folder, tmp_path / "deepspeed", "other", flag, "--engine", "deepspeed", ranks=2)
    for key in KEYS:
        assert largest_difference(found, expected, key) < 1e-5, key


def test_another_tokenizer_without_the_flag_is_rejected(folder: Path, tmp_path: Path) -> None:
    refused = train(
        tmp_path, "--data-path", folder / "data", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", folder / "student", check=False, TEACHER=str(folder / "other"),
    )  # fmt: skip
    assert refused.returncode != 0
    assert "--let-cross-tokenizer" in refused.error
