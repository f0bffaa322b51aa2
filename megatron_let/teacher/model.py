"""The frozen teacher: a Hugging Face base model, truncated after the tapped layer."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from transformers import AutoModel, PreTrainedModel

from megatron_let.config.let_config import LETConfig
from megatron_let.errors import LETError, first_line
from megatron_let.teacher.attention import (
    ARCHITECTURES,
    UNMASKED,
    use_document_attention,
    use_unmasked_attention,
    uses_unmasked_attention,
)
from megatron_let.teacher.broadcast import load_on_first_rank
from megatron_let.teacher.documents import Documents
from megatron_let.teacher.gguf import quiet_transformers
from megatron_let.teacher.inspect import TeacherFolder
from megatron_let.teacher.weight_files import check_all_loaded

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROBE_TOKENS = 8


def tapped_layer(teacher_layer: str, num_layers: int) -> int:
    """Return the 1-based number of the tapped layer for `last`, `middle` or a number.

    Raises:
        LETError: the teacher has fewer layers.
    """
    if teacher_layer == "last":
        return num_layers
    number = max(1, num_layers // 2) if teacher_layer == "middle" else int(teacher_layer)
    if number > num_layers:
        raise LETError(
            f"--let-teacher-layer is {number} but the teacher has {num_layers} layers; give a"
            f" number from 1 to {num_layers}."
        )
    return number


def layer_list(model: PreTrainedModel, num_layers: int) -> torch.nn.ModuleList:
    """Find the list of transformer layers, whose name depends on the architecture.

    A multimodal model may have as many layers in its vision tower.
    """
    for module in (model.get_decoder() or model).modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise LETError(
        f"The model {type(model).__name__} has no list of {num_layers} layers to tap; use a"
        " decoder such as Llama, GPT-2, OPT or GPT-NeoX."
    )


class _Tap:
    """Forward hook that holds the output of a layer.

    It does not refer to the teacher: a cycle through the hook would keep the weights on the device
    until the next garbage collection.
    """

    def __init__(self) -> None:
        self._state: torch.Tensor | None = None

    def __call__(self, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._state = output[0] if isinstance(output, tuple | list) else output

    def take(self) -> torch.Tensor:
        """Return the output of the last forward pass and release it."""
        state, self._state = self._state, None
        assert state is not None, "the tapped layer did not run"
        return state


class Teacher:
    """A frozen causal model that returns one hidden state.

    Attributes:
        width: d_T, size of the tapped state.
        dtype: of the weights and of the state.
        num_bytes: size of the weights on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_layers: int,
        tap: int,
        final_norm: bool,
        documents: Documents | None = None,
    ) -> None:
        """Freeze the model, remove the layers after the tap, and tap its state.

        Args:
            model: base model (no LM head).
            num_layers: number of layers of the model.
            tap: 1-based layer to return.
            final_norm: return the last layer after the final norm; only for the last layer.
            documents: borders within a row; None if a row is one sequence.

        Raises:
            LETError: the model cannot be used, or not with `documents`.
        """
        self._model: Any = model.eval().requires_grad_(False)
        self.dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype
        self._compiled: Any = None
        self._unmasked, self._documents = uses_unmasked_attention(model), documents
        if documents is not None:
            if not self._unmasked:
                raise LETError(
                    f"The teacher {type(model).__name__} cannot be told where a document begins;"
                    f" use one of {', '.join(sorted(ARCHITECTURES))}, or drop --reset-position-ids"
                    " and --reset-attention-mask."
                )
            use_document_attention(model)
        layers = layer_list(model, num_layers)
        self._tap = None if tap == num_layers and final_norm else _Tap()
        if self._tap is not None:
            layers[tap - 1].register_forward_hook(self._tap)
        # Layers after the tap would only cost time and memory.
        del layers[tap:]
        self.width = self._check_causal()
        if documents is not None:
            self._check_documents(documents)
            if not documents.reset_attention:
                # Causal attention needs no mask.
                model.set_attn_implementation(UNMASKED)
        self.num_bytes = sum(
            t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())
        )

    def compile(self) -> None:
        """Use `torch.compile` from the next call on; the model runs as it is if that fails."""
        # Shapes are those of a microbatch. A second one is compiled anew instead of dynamically.
        self._compiled = torch.compile(self._model, dynamic=False)

    @torch.no_grad()
    def hidden_state(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tapped state `[b, s, d_T]` of tokens `[b, s]` (int64), in `dtype`."""
        if self._documents is None:
            mask = torch.ones_like(tokens) if self._unmasked else None
            output = self._run(input_ids=tokens, attention_mask=mask, use_cache=False)
        else:
            inputs = self._documents.inputs(tokens)
            output = self._run(input_ids=tokens, use_cache=False, **inputs)
        state = output.last_hidden_state if self._tap is None else self._tap.take()
        # Mamba keeps its residual stream in fp32; the receiver's buffers have the weights' type.
        return state.to(self.dtype) if isinstance(state, torch.Tensor) else state

    def _run(self, **inputs: Any) -> Any:
        if self._compiled is None:
            return self._model(**inputs)
        try:
            return self._compiled(**inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler and its tools raise many types
            self._compiled = None
            # A backend's error is wrapped, and the wrapper's first line is without the reason.
            reason = first_line(getattr(error, "inner_exception", error))
            logger.warning("LET: the teacher runs without torch.compile, which failed: %s", reason)
            return self._model(**inputs)

    @staticmethod
    def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
        # In 16 bits the kernels may tile the last tokens differently.
        tolerance = 1e-4 if first.dtype == torch.float32 else 1e-2
        return torch.allclose(first.float(), second.float(), atol=tolerance, rtol=tolerance)

    def _check_causal(self) -> int:
        """Check that no token attends to a later one; return the width of the state.

        Raises:
            LETError: the teacher is bidirectional and would leak the next token to the student, or
                its layer returns no state per token.
        """
        device = self._model.get_input_embeddings().weight.device
        tokens = torch.arange(PROBE_TOKENS, device=device)[None]
        changed = tokens.clone()
        changed[0, -1] = 0
        first, second = self.hidden_state(tokens), self.hidden_state(changed)
        if not isinstance(first, torch.Tensor) or first.shape[:-1] != tokens.shape:
            shape = tuple(getattr(first, "shape", ())) or type(first).__name__
            raise LETError(
                f"The teacher {type(self._model).__name__} returns {shape} from its layer instead"
                " of one state per token; give another --let-teacher-layer or teacher."
            )
        # NaN compares unequal to itself; the first training step reports it with a clear message.
        if first.isfinite().all() and not self._same(first[:, :-1], second[:, :-1]):
            raise LETError(
                f"The teacher {type(self._model).__name__} is not causal: a later token changes"
                " the state of an earlier one; use a causal language model."
            )
        return first.shape[-1]

    def _check_documents(self, documents: Documents) -> None:
        """Check that neither other documents nor its place in the row change a document's state.

        Raises:
            LETError: the model does not use its positions or its mask.
        """
        device = self._model.get_input_embeddings().weight.device
        tokens = [token for token in range(10) if token != documents.eod]
        one, two, three = ([*tokens[i : i + 3], documents.eod] for i in (0, 3, 6))
        rows = torch.tensor([one + two, three + two, two + one], device=device)
        self._documents = replace(documents, reset_positions=True, reset_attention=True)
        state = self.hidden_state(rows).float()
        self._documents = documents
        length = len(one)
        expected = state[0, length:]
        tolerance = 1e-3 if self._model.dtype == torch.float32 else 5e-2
        for found in (state[1, length:], state[2, :length]):
            error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            if state.isfinite().all() and (error > tolerance).any():
                raise LETError(
                    f"The teacher {type(self._model).__name__} does not restart in each document:"
                    " another one changes its states; use another teacher, or drop"
                    " --reset-position-ids and --reset-attention-mask."
                )


class TokenAlignedTeacher(Teacher):
    """A teacher with another tokenizer than the student's.

    A row of its input is the text under the teacher's tokenizer, followed by one index per token
    of the student; `data.token_alignment` builds the rows.
    """

    def __init__(self, teacher: Teacher, teacher_length: int) -> None:
        """Wrap a teacher.

        Args:
            teacher_length: tokens per row under the teacher's tokenizer.
        """
        self._model, self._teacher, self._teacher_length = teacher._model, teacher, teacher_length
        self.width, self.num_bytes, self.dtype = teacher.width, teacher.num_bytes, teacher.dtype

    def hidden_state(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states `[b, s, d_T]` of rows `[b, teacher_length + s]`.

        They are 0 where the index is -1: a zero vector has cosine 0 and no gradient.
        """
        own, index = tokens.tensor_split([self._teacher_length], dim=1)
        state = self._teacher.hidden_state(own)
        places = index.clamp_min(0)[..., None].expand(-1, -1, state.shape[-1])
        return state.gather(1, places).masked_fill(index[..., None] < 0, 0)


class Sharding(Protocol):
    """Sharding of the teacher over ranks."""

    def shard(self, model: Any) -> Any:
        """Shard a model that is on the CPU; return it, ready to run."""
        ...

    def free(self) -> None:
        """Release the shards."""
        ...


def load_teacher(
    folder: TeacherFolder,
    config: LETConfig,
    device: torch.device,
    sharding: Sharding | None = None,
    teacher_length: int | None = None,
    documents: Documents | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Teacher:
    """Load a teacher, ready to run.

    Args:
        config: layer, norm, precision and compilation of the teacher.
        sharding: shards the teacher over ranks; None loads the whole teacher.
        teacher_length: tokens per sample under the teacher's tokenizer with
            `--let-cross-tokenizer`; None without it.
        documents: borders within a row; None if a row is one sequence.
        group: ranks that load the teacher together, of which the first reads the files; None for
            this rank alone. With `sharding` every rank reads them.

    Raises:
        LETError: weights are missing from the files, or the model cannot be tapped.
    """
    tap = tapped_layer(config.teacher_layer, folder.num_layers)
    load = functools.partial(load_model, folder, config, device, AutoModel)
    model = load_on_first_rank(load, device, group) if sharding is None else sharding.shard(load())
    teacher = Teacher(model, folder.num_layers, tap, config.teacher_final_norm, documents)
    by_default = device.type == "cuda" and sharding is None
    if config.teacher_compile or (config.teacher_compile is None and by_default):
        teacher.compile()
    return teacher if teacher_length is None else TokenAlignedTeacher(teacher, teacher_length)


def load_model(
    folder: TeacherFolder, config: LETConfig, device: torch.device, kind: Any
) -> PreTrainedModel:
    """Load the teacher in host memory.

    Args:
        config: precision of the teacher.
        device: training device, whose random state is preserved.
        kind: auto class of transformers.

    Raises:
        LETError: the files cannot be read, or they and the model have different weights.
    """
    # Building a model draws random numbers; the student's dropout must not change with them.
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        model, report = from_pretrained(folder.path, DTYPES[config.teacher_dtype], kind)
    # A pooler reads the last state, and nothing of a teacher reads the pooler.
    report["missing_keys"] = {k for k in report["missing_keys"] if not k.startswith("pooler.")}
    check_all_loaded(folder.path, report, _output_layers(model, report))
    use_unmasked_attention(model)
    return model


def _output_layers(model: PreTrainedModel, report: dict[str, Any]) -> set[str]:
    """Return the unread weights outside the base model, which are of output layers."""
    inside = {name.partition(".")[0] for name, _ in model.named_parameters()}
    inside.add(model.base_model_prefix)
    return {name for name in report["unexpected_keys"] if name.partition(".")[0] not in inside}


def from_pretrained(folder: Path, dtype: torch.dtype | None, kind: Any) -> tuple[Any, Any]:
    """Load a model folder in host memory; attention is SDPA if the architecture supports it.

    Args:
        dtype: precision of the weights; None keeps that of the config.
        kind: auto class of transformers.

    Returns:
        The model and transformers' report for `check_all_loaded`.

    Raises:
        LETError: transformers cannot load the folder.
    """
    options: dict[str, Any] = {
        "dtype": dtype or "auto",
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    try:
        with quiet_transformers():
            try:
                return kind.from_pretrained(folder, attn_implementation="sdpa", **options)
            except ValueError:
                return kind.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except UnpicklingError as error:
        raise LETError(
            f"The weights of {folder} are damaged, or a pickle with code, which is never run; give"
            " the model as safetensors."
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise LETError(
            f"The model {folder} cannot be loaded ({first_line(error)}); check that config.json and"
            " the weight files are of one model."
        ) from error
