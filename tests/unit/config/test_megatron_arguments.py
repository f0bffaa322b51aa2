"""Every argument of Megatron is honoured by someone, or refused by name."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import pytest
from megatron.core.package_info import __version__ as megatron_version

from megatron_let.config.megatron_arguments import check_known, check_layers, read_lists
from megatron_let.errors import LETError

# What Megatron 0.20.0 (main of 2026-08-22) has and lacks. The new ones are in no list, so they are
# refused once they are set.
NEW_IN_0_20 = """
  batch_invariant_backend ckpt_drop_redundant_extra_state ckpt_fully_parallel_load_per_rank_objects
  ckpt_pg_tensors_cache_create ckpt_pg_tensors_cache_path enable_mhc_connections gdp_cutedsl_kernel
  gdp_num_chunk_states_to_recompute gdp_num_householder gtp_expert_remat_nccl_ub gtp_remat_nccl_ub
  gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation logit_dtype
  megatron_fsdp_version mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num
  mhc_sinkhorn_iterations moe_combine_bwd_dtype moe_dispatch_fwd_dtype moe_use_grouped_tensor
  mtp_hsm muon_use_syrk otel_enabled otel_service_name otel_span_groups rl_durable_rollout_bank
  rl_max_inflight_requests rl_rollout_bank_dir rl_rollout_bank_max_bytes save_tokenizer_assets
  use_gigatoken
"""
GONE_IN_0_20 = "moe_ncclep_static_shape stream_ckpt_dequant"


def megatron_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the actions of Megatron's own arguments."""
    ours = ("let_", "engine", "deepspeed_config")
    return [a for a in parser._actions if not a.dest.startswith(ours) and a.dest != "help"]


def defaults(parser: argparse.ArgumentParser, implementation: str) -> argparse.Namespace:
    args = parser.parse_args([])
    args.transformer_impl = implementation
    return args


def test_lists_hold_each_argument_of_megatron_once(parser: argparse.ArgumentParser) -> None:
    """For a new Megatron: put each new argument into the list of who honours it."""
    listed = [name for names in read_lists().values() for name in names]
    assert len(listed) == len(set(listed))
    expected = set(listed)
    if megatron_version.startswith("0.20"):
        expected = expected - set(GONE_IN_0_20.split()) | set(NEW_IN_0_20.split())
    assert expected == {action.dest for action in megatron_actions(parser)}


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_defaults_are_accepted(parser: argparse.ArgumentParser, implementation: str) -> None:
    check_known(defaults(parser, implementation), megatron_actions(parser))


def test_argument_of_a_later_megatron_is_refused_once_it_is_set(
    parser: argparse.ArgumentParser,
) -> None:
    parser = copy.deepcopy(parser)
    parser.add_argument("--new-attention", type=int, default=4)
    actions = megatron_actions(parser)
    check_known(parser.parse_args(["--new-attention", "4"]), actions)
    with pytest.raises(LETError, match="--new-attention 5 is not known"):
        check_known(parser.parse_args(["--new-attention", "5"]), actions)


@pytest.mark.parametrize(
    "refused", ["transformer_engine", "custom_script", "mamba", "runs_code", "no_effect"]
)
def test_each_argument_outside_the_honoured_lists_is_refused_by_its_flag(
    parser: argparse.ArgumentParser, refused: str
) -> None:
    actions = megatron_actions(parser)
    for name in read_lists()[refused] & {action.dest for action in actions}:
        args = defaults(parser, "local")
        setattr(args, name, not getattr(args, name))
        flags = [option for a in actions if a.dest == name for option in a.option_strings]
        with pytest.raises(LETError) as error:
            check_known(args, actions)
        assert any(str(error.value).startswith(flag) for flag in flags), name


@pytest.mark.parametrize(
    "given",
    [
        ["--moe-grouped-gemm", "--num-experts", "4"],
        ["--moe-router-fusion", "--num-experts", "4"],
        ["--mla-down-proj-fusion", "--multi-latent-attention"],
        ["--apply-layernorm-1p"],
        ["--experimental-attention-variant", "dsa"],
        ["--window-size", "4,0"],
        ["--softmax-type", "learnable"],
        ["--no-rope-freq", "2"],
        ["--fp8-format", "e4m3"],
    ],
    ids=lambda given: given[0],
)
def test_model_that_local_layers_cannot_build_is_refused(
    parser: argparse.ArgumentParser, given: list[str]
) -> None:
    args, actions = parser.parse_args(given), megatron_actions(parser)
    args.transformer_impl = "local"
    for check in (check_known, check_layers):
        with pytest.raises(LETError, match=f"^{given[0]}.*Transformer Engine"):
            check(args, actions)
    args.transformer_impl = "transformer_engine"
    check_known(args, actions)


@pytest.mark.parametrize("given", [["--use-rope-scaling"], ["--attention-output-gate"]])
def test_argument_that_latent_attention_ignores_is_refused(
    parser: argparse.ArgumentParser, given: list[str]
) -> None:
    with pytest.raises(LETError, match=f"^{given[0]} has no effect with --multi-latent-attention"):
        check_layers(
            parser.parse_args([*given, "--multi-latent-attention"]), megatron_actions(parser)
        )


def test_layers_of_multi_token_prediction_stay_on_the_last_stage(
    parser: argparse.ArgumentParser,
) -> None:
    args = parser.parse_args(
        ["--mtp-num-layers", "1", "--pipeline-model-parallel-layout", "Et|tm|L"]
    )
    with pytest.raises(LETError, match="--pipeline-model-parallel-layout"):
        check_layers(args, megatron_actions(parser))


TP2 = ["--tensor-model-parallel-size", "2"]
EXPERTS = ["--num-experts", "4", "--moe-token-dispatcher-type", "alltoall"]
GLOO = ["--distributed-backend", "gloo", "--sequence-parallel"]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ([*EXPERTS, *TP2], ["--sequence-parallel"]),
        (["--multi-latent-attention", *TP2], ["--sequence-parallel"]),
        ([*EXPERTS, *TP2, *GLOO], ["--moe-token-dispatcher-type", "allgather"]),
        ([*EXPERTS, *TP2, *GLOO], ["--expert-tensor-parallel-size", "1"]),
    ],
)
def test_layers_that_tensor_parallelism_breaks_are_refused(
    parser: argparse.ArgumentParser, given: list[str], remedy: list[str]
) -> None:
    actions = megatron_actions(parser)
    with pytest.raises(LETError, match=" ".join(remedy)):
        check_layers(parser.parse_args(given), actions)
    check_layers(parser.parse_args([*given, *remedy]), actions)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_heads_that_cannot_be_grouped_are_refused(
    parser: argparse.ArgumentParser, implementation: str
) -> None:
    args = defaults(parser, implementation)
    args.group_query_attention, args.num_attention_heads, args.num_query_groups = True, 4, 3
    with pytest.raises(LETError, match=r"--num-attention-heads 4 .* --num-query-groups 3"):
        check_layers(args, megatron_actions(parser))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        # Read in Megatron's get_model() and in its own script, which this entry does not call.
        (["--freeze-all-layers"], "custom training script"),
        (["--inprocess-restart"], "custom training script"),
        (["--decoder-num-layers", "2"], "has no effect"),
        (["--trust-remote-code"], "never run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flag_that_this_entry_cannot_honour_is_refused(
    parser: argparse.ArgumentParser, given: list[str], reason: str
) -> None:
    with pytest.raises(LETError, match=f"^{given[0]}.*{reason}"):
        check_known(parser.parse_args(given), megatron_actions(parser))


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (["--rampup-batch-size", "2", "2", "32"], "--step-batch-size-schedule"),
        (["--use-flash-attn"], "--attention-backend"),
        (["--bert-load", "x"], "drop it"),
        (["--apply-residual-connection-post-layernorm"], "drop it"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flag_without_effect_is_refused_and_names_the_one_that_works(
    parser: argparse.ArgumentParser, given: list[str], instead: Any
) -> None:
    with pytest.raises(LETError, match=f"^{' '.join(given)} has no effect.*{instead}"):
        check_known(parser.parse_args(given), megatron_actions(parser))
