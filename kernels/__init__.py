"""Tensor maths on one device: torch, and Triton and FlashAttention where there; no process group."""
