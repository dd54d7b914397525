"""Tensor maths on one device: torch, Triton and FlashAttention where there; no process group."""
