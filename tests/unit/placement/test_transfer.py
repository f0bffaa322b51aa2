"""Communication while states are sent."""

from __future__ import annotations

import pytest
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron_let.placement.transfer import without_device_wait


@pytest.mark.parametrize("before", [True, False])
def test_device_wait_is_restored(before: bool) -> None:
    config = ModelParallelConfig(batch_p2p_sync=before)
    restore = without_device_wait(config)
    assert config.batch_p2p_sync is False
    restore()
    assert config.batch_p2p_sync is before
