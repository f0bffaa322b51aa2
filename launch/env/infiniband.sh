#!/usr/bin/env bash
# NCCL over InfiniBand (mlx5 adapters); a comment gives the reason of each setting.
# With the default of 2^20 x 4 us per retry a short link flap ends the run; this waits 4x as long.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
