#!/usr/bin/env bash
# NCCL over TCP sockets, where there is no RDMA. One reason a line.
# Without it NCCL waits for adapters that are there but lead nowhere.
export NCCL_IB_DISABLE=1
# One thread does not keep up with a link of 25 Gbit/s and more.
export NCCL_SOCKET_NTHREADS=4
# Nor does one TCP stream; 4 threads x 4 sockets fill 100 Gbit/s.
export NCCL_NSOCKS_PERTHREAD=4
