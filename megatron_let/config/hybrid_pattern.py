"""The layers of Megatron's HybridModel, as `--let-layer` counts them.

A HybridModel is a row of entries, each of which is attention, a state-space mixer, an MLP or
experts; what the paper calls layer k is several of them.
"""

from __future__ import annotations

from itertools import pairwise

from megatron_let.errors import LETError


def pattern_layers(pattern: str) -> list[range]:
    """Return the entries of each layer of a `--hybrid-layer-pattern`, counted from 1.

    A layer begins at each attention or state-space entry and ends before the next one: the MLP and
    MoE entries belong to the mixer before them. Those at the start of the pattern are a layer of
    their own. `|` separates pipeline stages and is not an entry; what follows `/` predicts further
    tokens and is not counted.

    Args:
        pattern: such as `*-*-|M-*-`, in the symbols of Megatron's `hybrid_layer_allocation`.

    Raises:
        LETError: Megatron cannot parse the pattern.
    """
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    entries = _main_pattern(pattern).replace(Symbols.PIPE, "")
    without_mixer = (Symbols.MLP, Symbols.MOE)
    starts = [
        number
        for number, symbol in enumerate(entries, 1)
        if number == 1 or symbol not in without_mixer
    ]
    return [range(start, end) for start, end in pairwise([*starts, len(entries) + 1])]


def last_entry(layer: int, pattern: str | None) -> int:
    """Return the 1-based number of the module whose output is the state after layer `layer`.

    Args:
        layer: k, from 1 to the number of layers.
        pattern: None for a model whose modules are whole layers, as of GPTModel.
    """
    return layer if pattern is None else pattern_layers(pattern)[layer - 1][-1]


def describe_layer(layer: int, pattern: str) -> str:
    """Return one line for the log: the entries that layer k became."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    layers = pattern_layers(pattern)
    group = layers[layer - 1]
    symbols = _main_pattern(pattern).replace(Symbols.PIPE, "")[group[0] - 1 : group[-1]]
    which = f"entry {group[0]}" if len(group) == 1 else f"entries {group[0]} to {group[-1]}"
    return (
        f"layer {layer} of {len(layers)} is {which} ({symbols}) of --hybrid-layer-pattern"
        f" {pattern}; the output of entry {group[-1]} is aligned"
    )


def without_stages(pattern: str | None) -> str | None:
    """Return a pattern without its `|`, which change where entries run and not what they are."""
    return pattern and pattern.replace("|", "")


def _main_pattern(pattern: str) -> str:
    from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern

    try:
        return parse_hybrid_pattern(pattern).main_pattern or ""
    except ValueError as error:
        reason = str(error).rstrip(".").replace(". ", "; ")
        raise LETError(f"--hybrid-layer-pattern {pattern} cannot be read: {reason}.") from error
