#!/usr/bin/env bash
# NCCL over TCP sockets, where there is no RDMA. One reason a line.
# Without it NCCL waits for adapters that are there but lead nowhere.
export NCCL_IB_DISABLE=1
# One stream does not fill a link of 25 Gbit/s and more; 4 threads x 4 sockets do.
export NCCL_SOCKET_NTHREADS=4
export NCCL_NSOCKS_PERTHREAD=4
