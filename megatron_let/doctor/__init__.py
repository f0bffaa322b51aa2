"""What this machine can run and how (`python -m megatron_let.doctor`); are nodes fit to train."""
