"""Helpers of upstream: generation, torch.distributed, checkpoints, benchmarks."""
