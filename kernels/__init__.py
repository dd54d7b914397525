"""Tensor maths on one device: imports torch and the standard library, no process group."""
