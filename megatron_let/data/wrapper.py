"""Data sets that change what another data set returns."""

from __future__ import annotations

from typing import Any

import torch


class DatasetWrapper(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set with the samples, the length and the attributes of another."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = self._dataset[index]
        return sample


class RepeatedDataset(DatasetWrapper):
    """Repeats the first samples of a data set, so that each evaluation is of the same tokens.

    Megatron's evaluations move on through the validation set, and the points of a curve would be
    of different text.
    """

    def __init__(self, dataset: Any, period: int, length: int, start: int = 0) -> None:
        """Repeat the first `period` samples, those of one evaluation, up to `length`.

        Args:
            start: index that the first evaluation begins at; the first sample is there.
        """
        super().__init__(dataset)
        self._period, self._length, self._start = period, length, start

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        # None asks Megatron's data sets for a sample of padding.
        if index is None:
            return super().__getitem__(None)
        return super().__getitem__((index - self._start) % self._period)
