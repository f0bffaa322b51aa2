"""TimesNet (Wu et al., 2023), the teacher: one encoder for several data sets, a head for each."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_let.timeseries.series import Series
from megatron_let.timeseries.settings import Settings


class Inception(nn.Module):
    """Mean of 2D convolutions of sizes 1, 3, 5, ..., `[b, channels, rows, columns]`."""

    def __init__(self, inputs: int, outputs: int, kernels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 2 * i + 1, padding=i) for i in range(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([convolution(x) for convolution in self.convolutions]).mean(0)


class TimesBlock(nn.Module):
    """Folds a series by its strongest periods into images, convolves them and unfolds them.

    Equations 1 to 6 of TimesNet's paper. The periods are those of each series, so that a state does
    not depend on the rest of the batch; the published code takes one set of periods per batch.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.num_frequencies = settings["frequencies"]
        self.convolution = nn.Sequential(
            Inception(settings["width"], settings["filters"], settings["kernels"]),
            nn.GELU(),
            Inception(settings["filters"], settings["width"], settings["kernels"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[b, s, width]` of `[b, s, width]`."""
        # Frequencies are periods per series, from 1; the constant component is not one.
        amplitudes = torch.fft.rfft(x, dim=1).abs().mean(2)[:, 1:]
        strongest, places = amplitudes.topk(min(self.num_frequencies, amplitudes.shape[1]), dim=1)
        weights, frequencies, result = strongest.softmax(1), places + 1, x
        # Series with a frequency in common have images of one shape.
        for frequency in frequencies.unique().tolist():
            rows, ranks = (frequencies == frequency).nonzero(as_tuple=True)
            unfolded = self._convolve(x[rows], frequency)
            result = result.index_add(0, rows, unfolded * weights[rows, ranks, None, None])
        return result

    def _convolve(self, x: Tensor, frequency: int) -> Tensor:
        """Convolve `[b, s, width]` as an image with one row per period, padded with zeros."""
        batch, length, width = x.shape
        period = -(-length // frequency)
        padded = F.pad(x, (0, 0, 0, period * frequency - length))
        image = padded.view(batch, frequency, period, width).permute(0, 3, 1, 2)
        return self.convolution(image).flatten(2).transpose(1, 2)[:, :length]


class TimesNet(nn.Module):
    """Encodes series of any number of channels and classifies those of its data sets.

    Padding is 0 before every layer. A state depends on the length that its data set is padded to,
    but not on the values in the padding.
    """

    def __init__(self, settings: Settings, classes: Mapping[str, int]) -> None:
        """Build the model from the settings of the teacher and the number of classes by set."""
        super().__init__()
        width, self.channels = settings["width"], settings["channels"]
        self.embedding = nn.Conv1d(self.channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(TimesBlock(settings) for _ in range(settings["blocks"]))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings["dropout"])
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def encode(self, series: Series) -> Tensor:
        """Return the state of the last block, `[b, s, width]`, 0 in the padding."""
        valid = series.mask[..., None]
        x = F.adaptive_avg_pool1d(series.values.where(valid, 0), self.channels)
        x = self.embedding(x.transpose(1, 2)).transpose(1, 2).where(valid, 0)
        for block in self.blocks:
            x = self.norm(block(x)).where(valid, 0)
        return x

    def forward(self, series: Series, name: str) -> Tensor:
        """Return logits, `[b, classes]`, of series of the data set `name`."""
        state = masked_mean(F.gelu(self.encode(series)), series.mask)
        return self.heads[name](self.dropout(state))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over valid time steps, `[b, width]`, of `[b, s, width]` and `[b, s]`."""
    return x.where(mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
