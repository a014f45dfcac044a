"""Fused implementations of the update rules, for the CPU and for GPUs."""
