"""How an update rule runs on local tensors: its inputs, fused kernels for the CPU and for GPUs, and exact sums."""
