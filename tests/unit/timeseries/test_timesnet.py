"""TimesNet against its definition, written out for one series, and its handling of padding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_let.timeseries.series import Series
from megatron_let.timeseries.timesnet import TimesBlock, TimesNet, masked_mean
from tests.helpers.time_series import small_settings

SETTINGS = small_settings()["teacher"]
WIDTH, COUNT = 6, 2


def amplitude(x: Tensor, frequency: int) -> float:
    """Return the mean amplitude over the width of `[s, width]`, from the sum of the DFT."""
    angle = 2 * math.pi * frequency * torch.arange(len(x), dtype=x.dtype) / len(x)
    real, imaginary = (angle.cos()[:, None] * x).sum(0), (angle.sin()[:, None] * x).sum(0)
    return float((real**2 + imaginary**2).sqrt().mean())


def inception(block: torch.nn.Module, image: Tensor) -> Tensor:
    outputs = [
        F.conv2d(image, c.weight, c.bias, padding=c.weight.shape[-1] // 2)
        for c in block.convolutions
    ]
    return sum(outputs) / len(outputs)


def defined(block: TimesBlock, x: Tensor) -> Tensor:
    """Return the block's output for one series `[s, width]`, element by element."""
    length = len(x)
    strengths = {f: amplitude(x, f) for f in range(1, length // 2 + 1)}
    strongest = sorted(strengths, key=lambda f: -strengths[f])[:COUNT]
    shares = torch.tensor([strengths[f] for f in strongest], dtype=x.dtype).softmax(0)
    result = x.clone()
    for frequency, share in zip(strongest, shares, strict=True):
        period = math.ceil(length / frequency)
        image = torch.zeros(1, x.shape[1], frequency, period, dtype=x.dtype)
        for step in range(length):
            image[0, :, step // period, step % period] = x[step]
        first, _, second = block.convolution
        image = inception(second, F.gelu(inception(first, image)))
        for step in range(length):
            result[step] += share * image[0, :, step // period, step % period]
    return result


@pytest.mark.parametrize("length", [3, 8, 11, 24])
def test_block_equals_its_definition(length: int) -> None:
    torch.manual_seed(length)
    block = TimesBlock(SETTINGS).double()
    x = torch.randn(5, length, WIDTH, dtype=torch.float64)
    x[1] += 3 * torch.sin(torch.arange(length) * 2.0)[:, None]
    expected = torch.stack([defined(block, one) for one in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def batch(lengths: list[int], channels: int = 3) -> Series:
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), 9, channels).where(mask[..., None], 0)
    return Series(values, mask, torch.zeros(len(lengths), dtype=torch.int64))


@pytest.fixture
def model() -> TimesNet:
    torch.manual_seed(0)
    return TimesNet(SETTINGS, {"Waves": 2}).eval()


def test_values_in_padding_change_nothing(model: TimesNet) -> None:
    series = batch([4, 9, 6])
    changed = replace(series, values=series.values.where(series.mask[..., None], torch.nan))
    state = model.encode(series)
    assert torch.equal(model.encode(changed), state)
    assert torch.equal(model(changed, "Waves"), model(series, "Waves"))
    assert not state[~series.mask].any() and state[series.mask].any(1).all()


def test_state_does_not_depend_on_other_series(model: TimesNet) -> None:
    series = batch([4, 9, 6])
    alone = series.rows(torch.tensor([2]), torch.device("cpu"))
    torch.testing.assert_close(model.encode(series)[2:], model.encode(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_number_of_channels_is_free(model: TimesNet, channels: int) -> None:
    assert model.encode(batch([5, 9], channels)).shape == (2, 9, WIDTH)


def test_masked_mean_is_mean_of_valid_steps() -> None:
    x = torch.randn(2, 9, 4)
    mask = torch.arange(9) < torch.tensor([[3], [9]])
    torch.testing.assert_close(masked_mean(x, mask), torch.stack([x[0, :3].mean(0), x[1].mean(0)]))
