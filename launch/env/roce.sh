#!/usr/bin/env bash
# NCCL over RoCE v2 (RDMA on Ethernet); a comment gives the reason of each setting.
# On most hosts GID index 3 is RoCE v2 over IPv4; `show_gids` prints the table.
export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX:-3}"
# The traffic class of the switches' lossless queue; ask the network's administrators.
export NCCL_IB_TC="${NCCL_IB_TC:-106}"
# With the default of 2^20 x 4 us per retry a short link flap ends the run; this waits 4x as long.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
