#!/usr/bin/env bash
# NCCL over InfiniBand (mlx5 adapters). One reason a line.
# Only the adapters of the compute network: a storage or management port would be the slowest link.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"
# The default of 2^20 x 4 us a retry ends a run for a short link flap; this waits 4x as long.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
