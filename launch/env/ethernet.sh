#!/usr/bin/env bash
# NCCL over TCP sockets, without RDMA; a comment gives the reason of each setting.
# Otherwise NCCL waits for InfiniBand adapters that are not connected.
export NCCL_IB_DISABLE=1
# One thread cannot saturate a link of 25 Gbit/s or more.
export NCCL_SOCKET_NTHREADS=4
# Nor can one TCP stream; 4 threads x 4 sockets saturate 100 Gbit/s.
export NCCL_NSOCKS_PERTHREAD=4
