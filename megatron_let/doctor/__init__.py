"""Checks of a machine (`python -m megatron_let.doctor`) and of the nodes of a job."""
