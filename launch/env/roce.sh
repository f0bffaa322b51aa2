#!/usr/bin/env bash
# NCCL over RoCE v2 (RDMA on Ethernet). One reason a line.
# Only the adapters of the compute network: a storage or management port would be the slowest link.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"
# The address of index 3 is RoCE v2 over IPv4 on most hosts; `show_gids` prints the table.
export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX:-3}"
# Switches give the lossless queue to this traffic class only; ask who runs them.
export NCCL_IB_TC="${NCCL_IB_TC:-106}"
# The default of 2^20 x 4 us a retry ends a run for a short link flap; this waits 4x as long.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
