"""LET outside Megatron: equal to the plain formula and the Megatron path, under torch's tools."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_let.checkpoint import reference_models
from megatron_let.checkpoint.parameter_mapping import parameter_mappings, split
from megatron_let.checkpoint.weights import open_weights
from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError
from megatron_let.late_to_early import LateToEarly
from megatron_let.losses import LOSSES
from megatron_let.methods import TrainingRun, build_method
from megatron_let.teacher.inspect import inspect_teacher
from megatron_let.teacher.model import load_teacher
from tests.helpers import plain_reference as plain
from tests.helpers.checkpoints import as_megatron, save_llama
from tests.helpers.models import save_teacher
from tests.helpers.runs import ROOT

LAYER, STOP_STEP, STEP, WEIGHT = 2, 10, 4, 2.0
D_T, BATCH, LENGTH = 12, 4, 16
DECAYED = WEIGHT * 0.6

MEANS = {
    "cosine": lambda h, t: -plain.mean_cosine(h, t),
    "logsum": plain.mean_logsum,
    "cca": lambda h, t: -plain.mean_correlation(h, t),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("student") / "llama", vocab_size=250)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Enable dynamo, which the CPU shims of other tests disable, and forget its code afterwards."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(250, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def state() -> Tensor:
    return torch.randn(BATCH, LENGTH, D_T, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Tensor:
    """Right padding of unequal lengths, as a tokenizer returns it."""
    lengths = torch.tensor([LENGTH, 3, 15, 9])
    return (torch.arange(LENGTH) < lengths[:, None]).long()


def aligned(model: Any, **changes: Any) -> LateToEarly:
    arguments = {"weight": WEIGHT, "stop_step": STOP_STEP, **changes}
    return LateToEarly(model.model.layers[LAYER - 1], **arguments)


def gradients(model: Any) -> Tensor:
    """Return all gradients as one vector, and clear them."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def expected(
    model: Any, ids: Tensor, state: Tensor, loss: str = "cosine", mask: Tensor | None = None
) -> Tensor:
    """Differentiate the sum of both losses by autograd, with the layer's output of transformers."""
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    hidden = output.hidden_states[LAYER]
    if mask is not None:
        hidden, state = hidden[mask.bool()], state[mask.bool()]
    (output.loss + DECAYED * MEANS[loss](hidden, state)).backward()
    return gradients(model)


def assert_equal(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).norm() < tolerance * wanted.norm()


def run(model: Any, let: LateToEarly, ids: Tensor, state: Tensor, **options: Any) -> Tensor:
    with let.step(STEP, state, **options):
        model(input_ids=ids, labels=ids).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_and_report_equal_the_plain_formula(
    loss: str, masked: bool, model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    state = state[..., :6] if loss == "cca" else state
    valid = mask if masked else None
    let = aligned(model, loss=loss)
    # NaN at padded tokens reaches neither the gradient nor the report.
    padded = state.masked_fill(mask[..., None] == 0, torch.nan) if masked else state
    found = run(model, let, ids, padded, mask=valid)
    wanted = expected(model, ids, state, loss, valid)
    assert_equal(found, wanted)
    hidden = model(ids, output_hidden_states=True).hidden_states[LAYER].detach()
    kept = torch.ones_like(mask).bool() if valid is None else mask.bool()
    cosine = plain.mean_cosine(hidden[kept], state[kept])
    assert let.report["cosine"].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert list(let.report) == (["cosine"] if loss == "cosine" else ["cosine", loss])


def test_layers_after_the_aligned_one_are_unchanged_bitwise(
    model: Any, ids: Tensor, state: Tensor
) -> None:
    found = []
    for weight in (0.0, WEIGHT):
        let = aligned(model, weight=weight)
        with let.step(STEP, state):
            model(input_ids=ids, labels=ids).loss.backward()
        let.remove()
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    changed = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    before = {name for name in found[0] if re.match(r"model\.(embed|layers\.[01]\.)", name)}
    assert changed == before


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
def test_accumulated_microbatches_equal_one_batch(
    sizes: list[int], model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    labels = ids.masked_fill(mask == 0, -100)
    let = aligned(model)
    with let.step(STEP, state, mask=mask):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=mask.sum()).loss
        loss.backward()
    wanted = gradients(model)
    for part, part_state, part_mask, part_labels in zip(
        *(x.split(sizes) for x in (ids, state, mask, labels)), strict=True
    ):
        with let.step(STEP, part_state, mask=part_mask, num_tokens=mask.sum()):
            output = model(input_ids=part, labels=part_labels, num_items_in_batch=mask.sum())
            output.loss.backward()
    assert_equal(gradients(model), wanted)


def test_microbatch_without_valid_tokens_adds_nothing(
    model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = gradients(model)
    let = aligned(model)
    assert torch.equal(run(model, let, ids, state, mask=mask * 0), wanted)
    assert let.report["cosine"].isnan()


# Mixed precision


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_alignment_is_computed_in_fp32_under_autocast(
    loss: str, backward_inside: bool, model: Any, ids: Tensor, state: Tensor
) -> None:
    state = state[..., :6] if loss == "cca" else state
    let = aligned(model, loss=loss)
    direction, hidden = [], []
    layer = model.model.layers[LAYER - 1]
    # What the layer gets as its gradient, and its output before the alignment.
    layer.mlp.register_forward_hook(
        lambda m, i, output: output.register_hook(direction.append) and None
    )
    layer.register_forward_hook(lambda m, i, output: hidden.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16), let.step(STEP, state):
        inputs = torch.randn(BATCH, LENGTH, 64, requires_grad=True)
        output = layer(inputs, position_embeddings=rotary())
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            (output.float() * 0).sum().backward()
    leaf = hidden[0].float().requires_grad_()
    (DECAYED * MEANS[loss](leaf, state)).backward()
    assert leaf.grad is not None
    # The output of the MLP is bf16.
    assert_equal(direction[0].float(), leaf.grad, 6e-3)


def rotary() -> tuple[Tensor, Tensor]:
    return torch.ones(1, LENGTH, 16), torch.zeros(1, LENGTH, 16)


def test_grad_scaler_gives_the_unscaled_gradient(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    wanted = run(model, let, ids, state)
    optimizer = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with let.step(STEP, state, loss_scale=scaler.get_scale()):
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    scaler.unscale_(optimizer)
    assert_equal(gradients(model), wanted)


# torch's tools


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_recomputed_layers_have_the_same_gradient(
    reentrant: bool, compiled: bool, model: Any, ids: Tensor, state: Tensor, mask: Tensor
) -> None:
    wanted = run(model, aligned(model), ids, state, mask=mask)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    let = aligned(model)
    student = torch.compile(model, backend="eager") if compiled else model
    assert_equal(run(student, let, ids, state, mask=mask), wanted)


def test_checkpoint_around_the_layer_aligns_once() -> None:
    layer, hidden = torch.nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    let, state = LateToEarly(layer), torch.randn(3, 4)
    found = []
    for reentrant in (None, True, False):
        with let.step(0, state):
            output = (
                layer(hidden)
                if reentrant is None
                else checkpoint(layer, hidden, use_reentrant=reentrant)
            )
            output.square().sum().backward()
        found.append(layer.weight.grad)
        layer.zero_grad()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.medium
def test_compiled_model_follows_the_schedule(model: Any, ids: Tensor, state: Tensor) -> None:
    found = []
    for student in (model, torch.compile(model, backend="aot_eager")):
        let, rows = aligned(model, stop_step=3), []
        for step in range(5):
            with let.step(step, state * (1 + step) if step < 3 else None):
                student(input_ids=ids, labels=ids).loss.backward()
            rows.append(gradients(model))
            assert bool(let.report) == (step < 3)
            with torch.no_grad():
                student(input_ids=ids)
        found.append(torch.stack(rows))
    assert_equal(found[1], found[0], 1e-6)
    assert not torch.equal(found[0][2], found[0][3])


@pytest.mark.usefixtures("dynamo")
def test_compiled_full_graph_is_refused_by_name(model: Any, ids: Tensor, state: Tensor) -> None:
    layer = torch.nn.Linear(8, 8)
    let = LateToEarly(layer)
    student = torch.compile(torch.nn.Sequential(layer), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="AlignmentHook"), let.step(0, torch.randn(3, 4)):
        student(torch.randn(3, 8))


# S_stop


def test_stop_step_removes_the_hook_and_nothing_refers_to_the_teacher(
    model: Any, ids: Tensor
) -> None:
    layer = model.model.layers[LAYER - 1]
    before = len(layer._forward_hooks)
    let, references = aligned(model), []
    gc.disable()
    try:
        for step in (0, STOP_STEP - 1):
            state = torch.randn(BATCH, LENGTH, D_T)
            references.append(weakref.ref(state))
            with let.step(step, state):
                model(input_ids=ids, labels=ids).loss.backward()
            del state
            assert references[-1]() is None
    finally:
        gc.enable()
    assert len(layer._forward_hooks) == before + 1
    with let.step(STOP_STEP, None):
        pass
    assert len(layer._forward_hooks) == before and let.report == {}
    with pytest.raises(LETError, match="LET has ended and step 3 is before stop_step 10"):
        let.step(3, torch.randn(BATCH, LENGTH, D_T)).__enter__()


def test_weight_is_equation_5(model: Any) -> None:
    let = aligned(model)
    assert [let.weight(s) for s in (0, 5, 10, 11)] == [WEIGHT, WEIGHT / 2, 0, 0]


def test_evaluation_between_steps_is_not_aligned(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    run(model, let, ids, state)
    model(input_ids=ids, labels=ids).loss.backward()
    found = gradients(model)
    let.remove()
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(found, gradients(model))


# Errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": -0.1}, "weight is -0.1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"stop_step": 0}, "stop_step is 0"),
        ({"loss": "mse"}, "loss is 'mse'; choose one of cosine"),
    ],
)
def test_bad_value_is_one_sentence(changes: dict[str, Any], words: str, model: Any) -> None:
    with pytest.raises(LETError, match=words):
        aligned(model, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"teacher_state": None}, "teacher_state is None at step 4"),
        (lambda s: {"teacher_state": s[:, 1:]}, "hold different tokens"),
        (lambda s: {"teacher_state": s.transpose(0, 1)}, "hold different tokens"),
        (lambda s: {"teacher_state": s[..., :1]}, "cannot interpolate"),
        (lambda s: {"teacher_state": s, "mask": torch.ones(BATCH, 1)}, "one value per token"),
    ],
)
def test_bad_state_is_one_sentence(change: Any, words: str, model: Any, ids: Tensor) -> None:
    let = aligned(model)
    with (
        pytest.raises(LETError, match=words),
        let.step(STEP, **change(torch.randn(BATCH, LENGTH, D_T))),
    ):
        model(input_ids=ids, labels=ids).loss.backward()


def test_cca_with_few_valid_tokens_is_refused(model: Any, ids: Tensor, mask: Tensor) -> None:
    let = aligned(model, loss="cca")
    words = r"correlates 11 features over 43 valid tokens .* at least 44"
    with pytest.raises(LETError, match=words):
        run(model, let, ids, torch.randn(BATCH, LENGTH, 11), mask=mask)


def test_block_without_forward_is_refused(model: Any, state: Tensor) -> None:
    with pytest.raises(LETError, match="did not run"), aligned(model).step(STEP, state):
        pass


def test_block_without_backward_is_refused(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    with pytest.raises(LETError, match="got no gradient"), let.step(STEP, state):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(LETError, match="after its step of LET had ended"):
        loss.backward()


def test_two_forwards_in_one_block_are_refused(model: Any, ids: Tensor, state: Tensor) -> None:
    let = aligned(model)
    with pytest.raises(LETError, match="ran twice"), let.step(STEP, state):
        model(ids)
        model(ids)
    assert_equal(run(model, let, ids, state), expected(model, ids, state))


def test_nested_blocks_are_refused(model: Any, state: Tensor) -> None:
    let = aligned(model)
    with (
        pytest.raises(LETError, match="is open"),
        let.step(STEP, state),
        let.step(STEP, state),
    ):
        pass


def test_error_in_the_block_is_not_replaced(model: Any, state: Tensor) -> None:
    with pytest.raises(ZeroDivisionError), aligned(model).step(STEP, state):
        raise ZeroDivisionError


def test_layer_without_a_tensor_is_refused() -> None:
    class Dictionary(torch.nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x}

    layer = Dictionary()
    let = LateToEarly(layer)
    words = "Dictionary returned dict"
    with pytest.raises(LETError, match=words), let.step(0, torch.randn(2, 4)):
        layer(torch.randn(2, 8, requires_grad=True))


# Without Megatron, and equal to the Megatron path


def test_module_and_teacher_need_no_megatron() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "import megatron_let.late_to_early, megatron_let.teacher.model, megatron_let.losses.cosine"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "llama")


def megatron_gradients(
    folder: Path, teacher: Path, ids: Tensor, megatron: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Run one global batch of a GPTModel by `LETMethod`, in two microbatches.

    Returns:
        Parameters and gradients under Megatron's names, and the report of each microbatch.
    """
    weights = open_weights(as_megatron(folder, megatron))
    settings = {"weight": WEIGHT, "stop_step": STOP_STEP, "teacher_dtype": "fp32"}
    with reference_models._megatron_on_cpu():
        model = reference_models._build(weights.llama, 256, torch.float32)
        reference_models._load_torch_dist(model, weights.folder)
        method = build_method(
            TrainingRun(
                config=LETConfig(method="let", teacher=teacher, layer=LAYER, **settings),
                folder=inspect_teacher(teacher),
                vocab_size=250,
                seed=1,
                num_steps=STOP_STEP,
                current_step=lambda: STEP,
                loaded_checkpoint=lambda: None,
                report=lambda line: None,
            )
        )
        microbatches = [{"tokens": x, "loss_mask": torch.ones(x.shape)} for x in ids.split(2)]
        reports = method.run(
            forward_backward,
            forward_step_func=lambda data, chunk: language_model_loss(chunk, next(data)["tokens"]),
            data_iterator=iter(microbatches),
            model=[model.train()],
            num_microbatches=2,
            micro_batch_size=2,
            seq_length=LENGTH,
            forward_only=False,
        )
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return parameters, found, reports


def language_model_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean loss of tokens as their own labels, over the unpadded vocabulary."""
    positions = torch.arange(tokens.shape[1])[None]
    logits = model(tokens, positions, None)[..., :250]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def forward_backward(
    *, forward_step_func: Any, data_iterator: Iterator[Any], model: list[Any], **_: Any
) -> list[dict[str, Tensor]]:
    reports = []
    for _ in range(2):
        loss = forward_step_func(data_iterator, model[0]) / 2
        loss.backward()
        reports.append({"lm loss": loss.detach()})
    return reports


@pytest.mark.medium
def test_gradients_equal_the_megatron_path_and_the_plain_model(
    folder: Path, teacher_folder: Path, model: Any, ids: Tensor, tmp_path: Path
) -> None:
    parameters, megatron, reports = megatron_gradients(
        folder, teacher_folder, ids, tmp_path / "megatron"
    )
    teacher = load_teacher(
        inspect_teacher(teacher_folder), LETConfig(teacher_dtype="fp32"), torch.device("cpu")
    )
    let, cosines = aligned(model), []
    for part in ids.split(2):
        with let.step(STEP, teacher.hidden_state(part), num_tokens=ids.numel()):
            logits = model(part).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten())
            (loss / 2).backward()
        cosines.append(let.report["cosine"].item())
    ours = {name: p.grad for name, p in model.named_parameters()}
    # Megatron's path
    llama = open_weights(folder).llama
    for mapping in parameter_mappings(llama):
        names = [with_layer(name, mapping.layer) for name in mapping.megatron]
        (theirs,) = (megatron[name] for name in names if name in megatron)
        for name, gradient in zip(mapping.names, split(mapping, theirs, llama), strict=True):
            assert_equal(ours[name], gradient)
            assert gradient.norm() > 0
    sums, count = reports[0]["let cosine"]
    assert sum(cosines) / 2 == pytest.approx((sums / count).item(), abs=1e-6)
    # The plain model, on Megatron's parameters
    state = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).state_dict()
    shape = plain.LlamaShape(3, 4, 2, norm_eps=1e-6)
    of_teacher = plain.Teacher({n: p.double() for n, p in state.items()}, shape, 3, True)
    objective = plain.LETObjective(plain.LlamaShape(4, 4, 2), of_teacher, LAYER, WEIGHT, STOP_STEP)
    cut = {n: p[:250] if len(p) == 256 and "layers" not in n else p for n, p in parameters.items()}
    batch = plain.Batch(ids, ids, torch.ones_like(ids))
    exact = objective.gradients({n: p.double() for n, p in cut.items()}, batch, STEP)
    for name, gradient in exact.gradients.items():
        assert_equal(megatron[name][: len(gradient)].double(), gradient)
    assert sum(cosines) / 2 == pytest.approx(exact.cosine, abs=1e-6)


def with_layer(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("layers.", f"layers.{layer}.")


# The page's examples


def example(number: int) -> SimpleNamespace:
    """Run a Python block of the page; return its names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/any_loop.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(blocks[number], names)
    return SimpleNamespace(**names)


def test_loop_of_the_page_trains_past_stop_step(
    model: Any, ids: Tensor, mask: Tensor, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = example(1).small_model(str(teacher_folder), torch.device("cpu"))
    parts = [
        {"input_ids": part, "attention_mask": part_mask, "labels": part}
        for part, part_mask in zip(ids.split(2), mask.split(2), strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    module = example(0)
    module.train.__globals__["LateToEarly"] = lambda layer, **_: LateToEarly(layer, 10.0, 6)
    module.train(model, teacher, optimizer, [parts] * 8)
    cosines = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(cosines) == 6 and cosines[-1] > cosines[0] + 0.01


class Rows(torch.utils.data.Dataset):
    """Samples of unequal lengths, padded on the right."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self._ids, self._mask = ids, mask

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self._ids[index], self._mask[index]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }


@pytest.mark.medium
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_callback_of_the_page_gives_the_gradient_of_both_losses(
    num_microbatches: int,
    model: Any,
    ids: Tensor,
    mask: Tensor,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    teacher = example(1).small_model(str(teacher_folder), torch.device("cpu"))
    callback_type = example(2).LETCallback
    seen = []

    class Watched(callback_type):  # type: ignore[misc, valid-type]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    let = aligned(model, stop_step=2)
    layer = model.model.layers[LAYER - 1]
    wanted = trainer_gradient(model, ids, mask, teacher, num_microbatches)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=3, gradient_accumulation_steps=num_microbatches,
            per_device_train_batch_size=BATCH // num_microbatches, max_grad_norm=0,
            learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=1, data_seed=1,
        ),
        train_dataset=Rows(ids, mask),
        eval_dataset=Rows(ids, mask),
        callbacks=[watched := Watched(let, teacher)],
    )  # fmt: skip
    trainer.train()
    assert_equal(seen[0], wanted)
    cosines = [row["let_cosine"] for row in trainer.state.log_history if "let_cosine" in row]
    assert len(cosines) == 2 and watched.teacher is None
    assert not [hook for hook in layer._forward_hooks.values() if "_on_output" in repr(hook)]
    assert trainer.evaluate()["eval_loss"] > 0


def trainer_gradient(
    model: Any, ids: Tensor, mask: Tensor, teacher: Any, num_microbatches: int
) -> Tensor:
    """Return the gradient at step 0: the loss's mean over labels, the cosine's over tokens.

    A microbatch has the same share of the alignment whatever its length, so the order of the
    samples, which the trainer draws, matters.
    """
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    for rows in order.split(BATCH // num_microbatches):
        output = model(
            input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows],
            output_hidden_states=True, num_items_in_batch=count,
        )  # fmt: skip
        valid = mask[rows].bool()
        state = teacher.hidden_state(ids[rows])
        cosine = plain.mean_cosine(output.hidden_states[LAYER][valid], state[valid])
        (output.loss - WEIGHT / num_microbatches * cosine).backward()
    return gradients(model)
