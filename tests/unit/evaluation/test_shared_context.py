"""One forward pass per context gives the log-likelihoods of lm-eval's own batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.checkpoint.tokenizer_files import hugging_face_tokenizer
from megatron_let.evaluation.harness import Settings
from megatron_let.evaluation.models import open_model
from tests.helpers.checkpoints import save_llama, with_tokenizer

pytest.importorskip(
    "lm_eval", reason="lm-eval is missing: bash launch/lib/environment.sh evaluation"
)
from lm_eval.models.huggingface import HFLM

from megatron_let.evaluation import harness
from megatron_let.evaluation.shared_context import SharedContextLM, can_share_context

pytestmark = pytest.mark.medium

SIZES = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 48}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 8},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": SIZES | {"n_positions": 48, "n_inner": 64},
    "gpt_neox": SIZES,
    "bloom": SIZES | {"n_layer": 2, "n_head": 4},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
             "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}  # fmt: skip
UNSUITED: dict[str, dict[str, Any]] = {
    "mamba": SIZES | {"state_size": 4},
    "phi3": SIZES | {"rope_parameters": LONG_ROPE, "pad_token_id": 0},
    "lfm2": SIZES | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


def random_model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    # At the default scale all logits would be nearly equal.
    config.initializer_range = config.init_std = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer") / "llama"
    return hugging_face_tokenizer(with_tokenizer(save_llama(folder, vocab_size=600)))


def requests(seed: int) -> list[Any]:
    """Shared and single contexts, one-token and equal continuations, and some beyond the window."""
    draw = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return draw.choices(range(600), k=draw.randint(shortest, longest))

    found = []
    for context in [ids(1, 36) for _ in range(8)] + [ids(40, 60)]:
        for _ in range(draw.choice((1, 2, 4, 20))):
            found.append((("", ""), context, ids(1, 12)))
    draw.shuffle(found)
    return [*found, found[0]]


@pytest.mark.parametrize("kind", MODELS)
def test_shared_context_gives_log_likelihoods_of_lm_eval(kind: str, tokenizer: Any) -> None:
    model = random_model(kind, MODELS[kind])
    assert can_share_context(model)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 3, "device": "cpu"}
    shared, stock = (of(pretrained=model, **settings) for of in (SharedContextLM, HFLM))
    for seed in range(3):
        asked = requests(seed)
        # The most likely tokens, so that some answers are greedy.
        context = next(context for _, context, _ in asked if len(context) < 40)
        asked.append((("", ""), context, _greedy(model, context, 2)))
        expected = stock._loglikelihood_tokens(asked, disable_tqdm=True)
        found = shared._loglikelihood_tokens(asked, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert any(greedy for _, greedy in found) and not all(greedy for _, greedy in found)
        values = [value for value, _ in expected]
        assert [value for value, _ in found] == pytest.approx(values, rel=1e-4, abs=1e-4)


def _greedy(model: Any, context: list[int], length: int) -> list[int]:
    ids = torch.tensor([context])
    for _ in range(length):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(dim=-1)), dim=1)
    return [int(token) for token in ids[0, len(context) :]]


def test_context_is_computed_once_and_batches_are_bounded(tokenizer: Any) -> None:
    model = random_model("llama", MODELS["llama"])
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    asked = [(("", ""), [1, 2, 3], [4, 5, n]) for n in range(6, 26)]
    lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert shapes == [(1, 3), (16, 2), (1, 3), (4, 2)]


@pytest.mark.parametrize("kind", UNSUITED)
def test_model_whose_passes_depend_on_each_other_cannot_share(kind: str) -> None:
    assert not can_share_context(random_model(kind, UNSUITED[kind]))


def test_empty_continuation_is_refused_as_by_lm_eval(tokenizer: Any) -> None:
    model = random_model("llama", MODELS["llama"])
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    with pytest.raises(AssertionError):
        lm._loglikelihood_tokens([(("", ""), [1, 2], [])], disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [None, "2"], ids=["shared", "batches"])
def test_log_likelihood_of_bf16_model_is_not_rounded_to_bf16(
    batch_size: str | None, tmp_path: Path
) -> None:
    folder = with_tokenizer(save_llama(tmp_path / "llama", vocab_size=600))
    model = harness._lm_eval_model(
        open_model(folder), Settings(dtype="bfloat16"), batch_size, "cpu"
    )
    context, continuation = list(range(20, 30)), list(range(40, 80))
    ((found, _),) = model._loglikelihood_tokens(
        [(("", ""), context, continuation)], disable_tqdm=True
    )
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        chosen = model.model(ids).logits[0, 9:-1].double().log_softmax(dim=-1)
    # The sum is about -289, where bf16 has steps of 2; shapes change it by about 0.05.
    expected = float(chosen.gather(1, ids[0, 10:, None]).sum())
    assert found == pytest.approx(expected, abs=0.3)
