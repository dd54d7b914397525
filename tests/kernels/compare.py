"""How far a kernel is from the truth."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor, head_dim: int | None = None) -> float:
    """Norm of the difference over the norm of `expected`; the worst head's where they are named.

    Heads are compared alone because those that decay slowly have far larger outputs.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    if head_dim is not None:
        actual, expected = (x.movedim(head_dim, 0).flatten(1) for x in (actual, expected))
    else:
        actual, expected = actual.reshape(1, -1), expected.reshape(1, -1)
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return error.max().item()


def outputs_and_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What `function(*inputs)` returns, and the gradients of all of it, weighted at random.

    The weights depend on the shapes alone, so that two backends get the same.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(gradients)
