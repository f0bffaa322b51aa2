"""Recipes expand into command lines that Megatron accepts; the paper's have its numbers."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_let.compat.device import set_hardware_queues
from megatron_let.config.recipes import RecipeError, load_recipe, recipe_argv
from tests.helpers.runs import ROOT

CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if not path.name.startswith(("sweep", "time"))
)
VARIABLES = {"DATA": "/d/pile", "TEACHER": "/t/small", "OUTPUT": "/o/run", "TOKENIZER": "/tok"}
PAPER_GPUS = 32
# Ranks of the recipes that do not run on one.
RANKS = {"1p4b": PAPER_GPUS, "3b": PAPER_GPUS, "7b": PAPER_GPUS, "a1b": PAPER_GPUS, "70b": 512}


@pytest.fixture
def small_parser() -> argparse.ArgumentParser:
    """One flag of each kind."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--widths", type=int, nargs="*")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--norm", action=argparse.BooleanOptionalAction)
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--format", choices=["zarr", "dist"])
    return parser


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def assert_one_sentence(error: pytest.ExceptionInfo[RecipeError]) -> None:
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")), message


# The files in configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_is_parsed_by_megatron(path: Path, parser: argparse.ArgumentParser) -> None:
    settings = load_recipe(path)
    args = vars(parser.parse_args(recipe_argv(settings, parser, [], VARIABLES)))
    for name, value in settings.items():
        action = parser._option_string_actions["--" + name]
        found = args[action.dest]
        if isinstance(action, argparse.BooleanOptionalAction):
            assert found == value, name
        elif action.nargs == 0:
            assert found == (action.const if value else action.default), name
        elif isinstance(value, str) and "$" in value:
            for variable, content in VARIABLES.items():
                value = value.replace("${" + variable + "}", content)
            assert str(found) in (value, f"['{value}']"), name
        else:
            assert str(found) == str(value), name


@pytest.fixture
def megatron_on_any_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's validation reads a GPU's properties and, with TP, this variable.

    Experts need the properties of an A100.
    """
    # Set first, so that what the recipe's layout sets is undone.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    from megatron_let.compat import PatchSet
    from megatron_let.compat.cpu_shims import cpu_shims

    patches = PatchSet().apply_all(cpu_shims())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    yield
    patches.undo()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_passes_megatrons_validation(
    path: Path, parser: argparse.ArgumentParser, megatron_on_any_host: None
) -> None:
    args = parser.parse_args(recipe_argv(load_recipe(path), parser, [], VARIABLES))
    validate(args, RANKS.get(path.stem.split("_")[-1], 1))


@pytest.mark.parametrize("name", ["baseline_70b", "let_70b"])
def test_70b_recipe_passes_megatrons_validation_on_1024_ranks(
    name: str, parser: argparse.ArgumentParser, megatron_on_any_host: None
) -> None:
    settings = load_recipe(ROOT / f"configs/{name}.yaml")
    argv = recipe_argv(settings, parser, ["--micro-batch-size", "1"], VARIABLES)
    args = parser.parse_args(argv)
    validate(args, 1024)
    assert args.data_parallel_size == 32 and args.virtual_pipeline_model_parallel_size == 5


def validate(args: argparse.Namespace, num_ranks: int) -> None:
    """Run Megatron's validation as rank 0 of `num_ranks`."""
    from megatron.training.arguments import validate_args

    args.rank, args.world_size = 0, num_ranks
    set_hardware_queues(args)
    args._is_global_batch_size_explicitly_specified = True
    with contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)


# name -> layers, width, ffn, heads, micro batch, accumulation steps, peak learning rate
PAPER = {
    "1p4b": (24, 2048, 5461, 32, 16, 4, 4e-4),
    "3b": (None, None, None, None, None, None, 3e-4),
    "7b": (32, 4096, 11008, 32, 4, 16, 3e-4),
}


@pytest.mark.parametrize("method", ["baseline", "let"])
@pytest.mark.parametrize("size", PAPER)
def test_paper_recipe_has_the_papers_numbers(
    size: str, method: str, parser: argparse.ArgumentParser
) -> None:
    path = ROOT / f"configs/{method}_{size}.yaml"
    args = parser.parse_args(recipe_argv(load_recipe(path), parser, [], VARIABLES))
    layers, width, ffn, heads, micro_batch, accumulation, peak = PAPER[size]
    if layers is not None:
        shape = (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads)
        assert shape == (layers, width, ffn, heads)
        assert (args.micro_batch_size, accumulation) == (
            micro_batch,
            args.global_batch_size // args.micro_batch_size // PAPER_GPUS,
        )
    assert args.normalization == "RMSNorm" and args.swiglu and args.bf16
    assert (args.seq_length, args.global_batch_size, args.train_iters) == (1280, 2048, 7629)
    assert args.seq_length * args.global_batch_size * args.train_iters == pytest.approx(2e10, 1e-3)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.999)
    assert (args.weight_decay, args.clip_grad) == (0.01, 1.0)
    assert (args.lr, args.min_lr) == (peak, pytest.approx(0.1 * peak))
    assert args.lr_decay_style == "cosine" and args.optimizer == "adam"
    assert args.lr_warmup_iters == pytest.approx(0.1 * args.train_iters, abs=1)
    assert args.global_batch_size % (args.micro_batch_size * PAPER_GPUS) == 0


@pytest.mark.parametrize("size", PAPER)
def test_paper_let_recipe_has_the_papers_alignment(
    size: str, parser: argparse.ArgumentParser
) -> None:
    path = ROOT / f"configs/let_{size}.yaml"
    args = parser.parse_args(recipe_argv(load_recipe(path), parser, [], VARIABLES))
    assert (args.let_method, args.let_layer) == ("let", 3)
    assert (args.let_weight, args.let_stop_step) == (0.1, 1500)
    assert args.let_teacher_layer == "last"


def test_mixture_of_experts_has_the_sizes_of_its_name(parser: argparse.ArgumentParser) -> None:
    path = ROOT / "configs/let_moe_7b_a1b.yaml"
    args = parser.parse_args(recipe_argv(load_recipe(path), parser, [], VARIABLES))
    attention = 4 * args.hidden_size**2
    expert = 3 * args.hidden_size * args.moe_ffn_hidden_size
    embeddings = 2 * 49152 * args.hidden_size
    for experts, size in ((args.num_experts, 6.9e9), (args.moe_router_topk, 1.3e9)):
        found = args.num_layers * (attention + experts * expert) + embeddings
        assert found == pytest.approx(size, rel=0.02)
    tokens = args.seq_length * args.global_batch_size
    assert tokens * args.train_iters == pytest.approx(2e10, 1e-3)
    # The schedule of the paper's runs, in tokens.
    assert tokens * args.let_stop_step == 1280 * 2048 * 1500


@pytest.mark.parametrize("name", ["1p4b", "3b", "7b", "70b", "moe_7b_a1b", "quickstart"])
def test_let_and_baseline_differ_in_the_alignment_only(name: str) -> None:
    pair = ("quickstart_baseline", "quickstart_let") if name == "quickstart" else None
    baseline, let = (
        load_recipe(ROOT / f"configs/{stem}.yaml")
        for stem in pair or (f"baseline_{name}", f"let_{name}")
    )
    differing = {key for key in baseline | let if baseline.get(key) != let.get(key)}
    assert all(key.startswith("let-") or key == "tokenizer-model" for key in differing), differing
    assert "let-method" in differing


def test_70b_recipe_reads_a_trillion_tokens_in_batches_of_4_million(
    parser: argparse.ArgumentParser,
) -> None:
    path = ROOT / "configs/let_70b.yaml"
    args = parser.parse_args(recipe_argv(load_recipe(path), parser, [], VARIABLES))
    shape = (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads)
    assert (*shape, args.num_query_groups) == (80, 8192, 28672, 64, 8)
    assert args.seq_length * args.global_batch_size == 2**22
    assert 2**22 * args.train_iters == pytest.approx(1e12, rel=1e-5)
    # The share of the paper's steps.
    assert args.let_stop_step / args.train_iters == pytest.approx(0.2, abs=1e-5)


# The command line


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ([], {"layers": 4, "fuse": True, "norm": True, "widths": [1, 2]}),
        (["--layers", "6"], {"layers": 6}),
        (["--layers=6"], {"layers": 6}),
        (["--widths", "9"], {"widths": [9]}),
        (["--no-norm"], {"norm": False}),
        (["--no-fuse"], {"fuse": False}),
        (["--fuse"], {"fuse": True}),
    ],
)
def test_command_line_overrides_settings(
    command_line: list[str], expected: dict[str, Any], small_parser: argparse.ArgumentParser
) -> None:
    settings = {"layers": 4, "fuse": True, "norm": True, "widths": [1, 2]}
    args = vars(small_parser.parse_args(recipe_argv(settings, small_parser, command_line, {})))
    assert {name: args[name] for name in expected} == expected


def test_overridden_setting_is_not_in_argv(
    small_parser: argparse.ArgumentParser,
) -> None:
    argv = recipe_argv({"layers": 4, "widths": [1]}, small_parser, ["--layers", "6"], {})
    assert argv == ["--widths", "1", "--layers", "6"]


def test_command_line_overrides_the_tiny_recipe(parser: argparse.ArgumentParser) -> None:
    settings = load_recipe(ROOT / "configs/tiny.yaml")
    flags = ["--num-layers", "2", "--no-swiglu", "--let-teacher", "/mine", "--data-path", "/d"]
    args = parser.parse_args(recipe_argv(settings, parser, flags, {}))
    assert (args.num_layers, args.swiglu, str(args.let_teacher)) == (2, False, "/mine")
    assert args.hidden_size == settings["hidden-size"]


def test_switch_set_to_false_is_omitted_or_negated(
    small_parser: argparse.ArgumentParser,
) -> None:
    assert recipe_argv({"fuse": False, "norm": False}, small_parser, [], {}) == ["--no-norm"]


def test_negative_and_quoted_values_are_parsed(parser: argparse.ArgumentParser) -> None:
    settings = {"let-weight": -0.5, "split": "90,10,0", "let-layer": "3"}
    args = parser.parse_args(recipe_argv(settings, parser, [], {}))
    assert (args.let_weight, args.split, args.let_layer) == (-0.5, "90,10,0", 3)


# Variables


def test_variables_are_substituted(small_parser: argparse.ArgumentParser) -> None:
    settings = {"data-path": ["0.5", "${A}/x", "0.5", "${A}${B}"]}
    argv = recipe_argv(settings, small_parser, [], {"A": "/a", "B": "b"})
    assert argv == ["--data-path", "0.5", "/a/x", "0.5", "/ab"]


def test_value_of_variable_is_not_expanded_again(small_parser: argparse.ArgumentParser) -> None:
    argv = recipe_argv({"data-path": "${A}"}, small_parser, [], {"A": "${B} c", "B": "no"})
    assert argv == ["--data-path", "${B} c"]


@pytest.mark.parametrize("variables", [{}, {"A": ""}], ids=["missing", "empty"])
def test_missing_variable_raises_error_naming_it_and_flag(
    variables: dict[str, str], small_parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(RecipeError, match="A for --data-path") as error:
        recipe_argv({"data-path": "${A}"}, small_parser, [], variables)
    assert_one_sentence(error)


def test_variable_of_overridden_setting_is_not_needed(
    small_parser: argparse.ArgumentParser,
) -> None:
    argv = recipe_argv({"data-path": "${A}"}, small_parser, ["--data-path", "/b"], {})
    assert argv == ["--data-path", "/b"]


# Mistakes


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("let-wieght", "let-weight"),
        ("num_layers", "num-layers"),
        ("learning-rate", None),
        ("let-stop-steps", "let-stop-step"),
        ("Seq-Length", "seq-length"),
    ],
)
def test_unknown_setting_raises_error_naming_nearest_flag(
    name: str, nearest: str | None, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(RecipeError, match=f"sets {name}, ") as error:
        recipe_argv({name: 1}, parser, [], {})
    assert nearest is None or f"did you mean {nearest}?" in str(error.value)
    assert_one_sentence(error)


def test_setting_unlike_any_flag_gets_no_suggestion(small_parser: argparse.ArgumentParser) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_argv({"zzzzzz": 1}, small_parser, [], {})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fuse", "yes please"),
        ("fuse", 1),
        ("layers", True),
        ("layers", None),
        ("layers", "four"),
        ("layers", 4.5),
        ("layers", [4, 5]),
        ("layers", {"first": 4}),
        ("widths", [1, None]),
        ("widths", [1, "x"]),
        ("format", "floppy"),
    ],
)
def test_value_of_wrong_type_raises_error_naming_setting(
    name: str, value: object, small_parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(RecipeError, match=f"sets {name} to ") as error:
        recipe_argv({name: value}, small_parser, [], {})
    assert_one_sentence(error)


def test_sections_are_flattened(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  layers: 4\nanything:\n  fuse: true\n  lr: 1e-3\n")
    assert load_recipe(path) == {"layers": 4, "fuse": True, "lr": "1e-3"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers: 4\n", "sections"),
        ("- layers\n", "sections"),
        ("", "sections"),
        ("model: [4\n", "YAML"),
        ("model:\n\tlayers: 4\n", "YAML"),
        ("model:\n  layers: 4\nagain:\n  layers: 5\n", "sets layers twice"),
        ("model:\n  layers: 4\n  layers: 5\n", "sets layers twice"),
        ("model:\n  layers: 4\nmodel:\n  width: 5\n", "sets model twice"),
    ],
    ids=[
        "no section", "list", "empty", "open bracket", "tab", "twice", "twice in one section",
        "section twice",
    ],
)  # fmt: skip
def test_invalid_file_raises_error_naming_it(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=expected) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    assert_one_sentence(error)


def test_missing_file_raises_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_file_that_is_not_utf8_raises_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model:\n  name: \xff\xfe\n")
    with pytest.raises(RecipeError, match="YAML"):
        load_recipe(path)
