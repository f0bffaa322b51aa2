"""Which entries of a HybridModel are layer k."""

from __future__ import annotations

import argparse
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count

from megatron_let.config.arguments import layer_number
from megatron_let.config.hybrid_pattern import describe_layer, last_entry, pattern_layers
from megatron_let.errors import LETError

ENTRIES = st.text("M*-EG", max_size=24)
WITHOUT_MIXER = set("-E")

# pattern -> the entries of each layer, between spaces.
LAYERS = {
    "*-*-*-*-": "*- *- *- *-",
    "M*M*": "M * M *",
    "MEM*E": "ME M *E",
    "M-M-|M-*-": "M- M- M- *-",
    # A layer on two stages, and an empty stage.
    "*|-||*-": "*- *-",
    "*-E*--": "*-E *--",
    "-*-": "- *-",
    "E": "E",
    "": "",
    "+-D-GE": "+- D- GE",
    "M*-*/MM/MM": "M *- *",
}


@pytest.mark.parametrize("pattern", LAYERS)
def test_layer_is_a_mixer_and_what_follows_it(pattern: str) -> None:
    entries = pattern.partition("/")[0].replace("|", "")
    layers = pattern_layers(pattern)
    assert [entries[r.start - 1 : r.stop - 1] for r in layers] == LAYERS[pattern].split()


@given(ENTRIES)
def test_layers_hold_each_entry_once_and_one_mixer(entries: str) -> None:
    layers = pattern_layers(entries)
    numbers = list(itertools.chain(*layers))
    assert numbers == list(range(1, get_hybrid_total_layer_count(entries) + 1))
    for index, group in enumerate(layers):
        mixers = [n for n in group if entries[n - 1] not in WITHOUT_MIXER]
        assert mixers == [group[0]] or (index == 0 and not mixers and len(group))


@given(ENTRIES, st.lists(st.integers(0, 24)), st.sampled_from(["", "/M*/M*"]))
def test_stages_and_further_tokens_change_no_layer(
    entries: str, cuts: list[int], further: str
) -> None:
    ends = [0, *sorted(min(cut, len(entries)) for cut in cuts), len(entries)]
    staged = "|".join(entries[a:b] for a, b in itertools.pairwise(ends))
    assert pattern_layers(staged + further) == pattern_layers(entries)


@given(st.lists(st.sampled_from(["*-", "M*-", "M"]), min_size=1).filter(lambda p: "*" in str(p)))
def test_state_after_a_transformer_layer_is_that_of_megatrons_pairing(parts: list[str]) -> None:
    """Megatron pairs entries with the layers of a GPTModel; its indices are 0-based."""
    pattern = "".join(parts)
    ends = {group[-1] - 1 for group in pattern_layers(pattern)}
    maps = gpt_compatible_layer_maps(pattern)
    assert set(maps.mlp_to_gpt) | maps.fresh_init == ends


def test_entry_of_a_transformer_pattern_is_two_k() -> None:
    assert [last_entry(k, "*-" * 4) for k in (1, 2, 3, 4)] == [2, 4, 6, 8]
    assert last_entry(3, None) == 3


@pytest.mark.parametrize(("layer", "expected"), [("middle", 2), ("last", 5), (4, 4), (None, 3)])
def test_flag_counts_layers_not_entries(layer: str | int | None, expected: int) -> None:
    args = argparse.Namespace(hybrid_layer_pattern="*-M*-M*-", num_layers=8, let_layer=layer)
    assert layer_number(args) == expected


def test_log_names_the_entries_of_layer_k() -> None:
    assert "layer 3 of 3 is entries 4 to 5 (*-) " in describe_layer(3, "*-|M*-")
    assert "layer 2 of 3 is entry 3 (M) " in describe_layer(2, "*-|M*-")


@pytest.mark.parametrize("pattern", ["*-X", "*+", "*-/M/*", "*-/M|M"])
def test_pattern_that_megatron_cannot_parse_raises_error_with_its_reason(pattern: str) -> None:
    with pytest.raises(LETError) as error:
        pattern_layers(pattern)
    assert str(error.value).startswith(f"--hybrid-layer-pattern {pattern} cannot be read: ")
