"""Adapters of Megatron's model to DeepSpeed."""

from __future__ import annotations

import torch

from megatron_let.engines.deepspeed.adapters import drop_empty_extra_states


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None:
        assert state is None


def test_empty_extra_states_are_dropped_on_save_and_restored_on_load() -> None:
    module = torch.nn.Sequential(WithExtraState(2, 2), torch.nn.Sequential(WithExtraState(2, 2)))
    assert "0._extra_state" in module.state_dict()
    drop_empty_extra_states(module)
    saved = module.state_dict()
    assert sorted(saved) == ["0.bias", "0.weight", "1.0.bias", "1.0.weight"]
    module.load_state_dict(saved, strict=True)
