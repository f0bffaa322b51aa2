#!/usr/bin/env bash
# NCCL over InfiniBand (mlx5 adapters). One reason a line.
# Only the adapters of the compute network: a storage or management port would be the slowest link.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"
# The default of about 1 s per retry ends a run for a short link flap; 2^22 x 4 us is about 17 s.
export NCCL_IB_TIMEOUT=22
# GPU and adapter under one PCIe host bridge talk without a detour through host memory.
export NCCL_NET_GDR_LEVEL=PHB
