"""Settings of a run against those of the checkpoint that it loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_let.checkpoint import load_check
from megatron_let.checkpoint.load_check import check_loaded
from megatron_let.config.arguments import flag
from megatron_let.errors import LETError
from megatron_let.files.names import TRACKER

SAVED: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
    "group_query_attention": False, "num_query_groups": 1, "kv_channels": 16,
    "layernorm_epsilon": 1e-5, "rotary_base": 10000, "qk_layernorm": True,
    "moe_router_pre_softmax": False, "moe_router_enable_expert_bias": False,
    "moe_expert_capacity_factor": None,
    "use_rope_scaling": False, "multi_latent_attention": False, "vocab_size": 256,
    "tokenizer_type": "NullTokenizer",
    "lr": 1e-3, "min_lr": 1e-4, "global_batch_size": 8, "train_iters": 10, "lr_decay_iters": 10,
    "lr_warmup_iters": 2, "lr_decay_style": "cosine", "start_weight_decay": 0.1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a checkpoint with the arguments SAVED."""
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / TRACKER).write_text("5")
    opened = SimpleNamespace(state={"args": argparse.Namespace(**SAVED)})
    monkeypatch.setattr(load_check, "open_checkpoint", lambda folder: opened)
    monkeypatch.setattr(load_check, "is_checkpoint", lambda folder: True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "saved", "ours"),
    [
        ("adam_beta1", 0.9, 0.5),
        ("adam_beta2", 0.95, 0.999),
        ("adam_eps", 1e-8, 1e-6),
        ("sgd_momentum", 0.9, 0.5),
    ],
)
def test_optimizer_setting_that_the_state_keeps_is_refused(
    folder: Path, name: str, saved: float, ours: float
) -> None:
    load_check.open_checkpoint(folder).state["args"] = argparse.Namespace(**SAVED, **{name: saved})
    check(folder, **{name: saved})
    named = f"{flag(name)} is {ours} .* {saved} .* --no-load-optim"
    for resumed in ({}, {"override_opt_param_scheduler": True}):
        with pytest.raises(LETError, match=named):
            check(folder, **{name: ours}, **resumed)
    for fresh in ({"no_load_optim": True}, {"finetune": True}):
        check(folder, **{name: ours}, **fresh)


def check(folder: Path, **changes: Any) -> None:
    ours = {
        "load": str(folder), "finetune": False, "train_samples": None, "no_load_optim": None,
        "ckpt_step": None,
        "pretrained_checkpoint": None, "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False, **SAVED,
        # Set by Megatron only later.
        "lr_decay_iters": None,
    }  # fmt: skip
    check_loaded(argparse.Namespace(**ours | changes), SimpleNamespace(vocab_size=256))


MODEL_CHANGES = [
    ({"rotary_base": 500000}, "--rotary-base is 500000 .* and 10000"),
    ({"layernorm_epsilon": 1e-6}, "--norm-epsilon is 1e-06"),
    ({"use_rope_scaling": True}, "--use-rope-scaling"),
    ({"qk_layernorm": False}, "--qk-layernorm"),
    ({"moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
    ({"moe_router_enable_expert_bias": True}, "--moe-router-enable-expert-bias"),
    ({"moe_expert_capacity_factor": 1.25}, "--moe-expert-capacity-factor"),
    ({"multi_latent_attention": True}, "--multi-latent-attention"),
    ({"group_query_attention": True, "num_query_groups": 2}, "--num-query-groups"),
]


@pytest.mark.parametrize(("changes", "named"), MODEL_CHANGES)
@pytest.mark.parametrize("way", ["load", "finetune", "pretrained"])
def test_other_model_is_refused_by_every_way_to_load(
    folder: Path, changes: dict[str, Any], named: str, way: str
) -> None:
    load: dict[str, Any] = {"finetune": way == "finetune"}
    if way == "pretrained":
        load = {"load": str(folder / "new"), "pretrained_checkpoint": str(folder)}
    with pytest.raises(LETError, match=named):
        check(folder, **load, **changes)
    check(folder, **load)


@pytest.mark.parametrize(
    "changes", [{"layernorm_epsilon": 9.999999747378752e-06}, {"kv_channels": None}]
)
def test_same_model_in_another_form_is_accepted(folder: Path, changes: dict[str, Any]) -> None:
    check(folder, **changes)


SCHEDULE_CHANGES = [
    ({"train_iters": 20}, "--train-iters is 20 .* and 10"),
    ({"train_iters": 20, "lr_decay_iters": 10}, "--train-iters is 20 .* and 10"),
    ({"lr_decay_iters": 8}, "--lr-decay-iters is 8 .* and 10"),
    ({"global_batch_size": 16}, "--global-batch-size is 16"),
    ({"lr_warmup_iters": 3}, "--lr-warmup-iters is 3"),
    ({"start_weight_decay": 0.2}, "--weight-decay is 0.2"),
    ({"lr": 0.5}, "--lr is 0.5 .* and 0.001"),
    ({"min_lr": 0.5}, "--min-lr is 0.5"),
]


@pytest.mark.parametrize(("changes", "named"), SCHEDULE_CHANGES)
def test_other_schedule_names_the_flags_that_allow_it(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    remedies = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    with pytest.raises(LETError, match=named) as error:
        check(folder, **changes)
    for remedy in remedies:
        assert "--" + remedy.replace("_", "-") in str(error.value)
        check(folder, **changes, **{remedy: True})
    check(folder, **changes, finetune=True)


@pytest.fixture
def by_samples(folder: Path) -> Path:
    """Folder of a checkpoint of a run of 80 samples, whose iterations Megatron derived."""
    saved = SAVED | {"train_samples": 80, "lr_decay_samples": None, "lr_warmup_samples": 16}
    load_check.open_checkpoint(folder).state["args"] = argparse.Namespace(**saved)
    return folder


def test_run_by_samples_resumes_and_its_schedule_is_compared(by_samples: Path) -> None:
    ours = {"train_iters": None, "lr_warmup_iters": 0, "train_samples": 80,
            "lr_decay_samples": None, "lr_warmup_samples": 16}  # fmt: skip
    check(by_samples, **ours)
    for name, given in (("train_samples", "--train-samples"), ("lr_warmup_samples", "--lr-warmup")):
        with pytest.raises(LETError, match=f"{given}.* is 160"):
            check(by_samples, **ours | {name: 160})


def test_epsilon_under_its_earlier_name_is_compared(folder: Path) -> None:
    saved = {name: value for name, value in SAVED.items() if name != "layernorm_epsilon"}
    load_check.open_checkpoint(folder).state["args"] = argparse.Namespace(
        **saved, norm_epsilon=1e-5
    )
    check(folder)
    with pytest.raises(LETError, match="--norm-epsilon is 1e-06"):
        check(folder, layernorm_epsilon=1e-6)


def test_larger_vocabulary_is_refused(folder: Path) -> None:
    small = argparse.Namespace(**SAVED | {"vocab_size": 100})
    load_check.open_checkpoint(folder).state["args"] = small
    with pytest.raises(LETError, match=r"256 tokens and the checkpoint .* 100"):
        check(folder)


PATTERN = {"hybrid_layer_pattern": "*-*-*-*-", "num_layers": 8}


@pytest.fixture
def hybrid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a checkpoint of a HybridModel on two stages."""
    saved = SAVED | PATTERN | {"hybrid_layer_pattern": "*-*-|*-*-"}
    opened = SimpleNamespace(state={"args": argparse.Namespace(**saved)})
    monkeypatch.setattr(load_check, "open_checkpoint", lambda folder: opened)
    return folder


def test_hybrid_model_resumes_with_other_stages_only(hybrid: Path) -> None:
    check(hybrid, **PATTERN)
    for other in ({"hybrid_layer_pattern": "*-*-*--*"}, {"hybrid_layer_pattern": None}):
        with pytest.raises(LETError, match=r"--hybrid-layer-pattern is .* in this run and \*-"):
            check(hybrid, **PATTERN | other)


def test_hybrid_model_takes_only_weights_of_a_gpt_checkpoint(folder: Path) -> None:
    for resumed in ({}, {"finetune": True}):
        with pytest.raises(LETError, match="--no-load-optim"):
            check(folder, **PATTERN, **resumed)
    check(folder, **PATTERN, no_load_optim=True)
    with pytest.raises(LETError, match="--rotary-base"):
        check(folder, **PATTERN, no_load_optim=True, rotary_base=5)


def test_rope_factor_that_the_checkpoints_run_ignored_is_refused(folder: Path) -> None:
    ours = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    saved = SAVED | ours
    load_check.open_checkpoint(folder).state["args"] = argparse.Namespace(**saved)
    with pytest.raises(LETError, match=r"--rope-scaling-factor is 32.0 .* and 8.0"):
        check(folder, **ours, applies_rope_scaling_factor=True)
    load_check.open_checkpoint(folder).state["args"] = argparse.Namespace(
        **saved, applies_rope_scaling_factor=True
    )
    check(folder, **ours, applies_rope_scaling_factor=True)
