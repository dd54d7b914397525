"""What some tokens add to metrics: sums and extremes that merge over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSums:
    """Float64 scalars on the tokens' device, so that taking them waits for nothing.

    Attributes:
        tokens: how many there are.
        sums: by name, over the tokens.
        max, min: by name; -inf and inf where there is no token.
    """

    tokens: Tensor
    sums: dict[str, Tensor]
    max: dict[str, Tensor]
    min: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        live: Tensor,
        sums: dict[str, Tensor],
        max: dict[str, Tensor] | None = None,
        min: dict[str, Tensor] | None = None,
    ) -> TokenSums:
        """Over the tokens that ``live``, a mask of the values' shape, is true for."""

        def summed(values: Tensor) -> Tensor:
            return torch.where(live, values, 0).sum(dtype=torch.float64)

        def largest(values: Tensor) -> Tensor:
            if not values.numel():
                return values.new_full((), -torch.inf, dtype=torch.float64)
            return torch.where(live, values, -torch.inf).amax().double()

        return cls(
            live.sum(dtype=torch.float64),
            {name: summed(values) for name, values in sums.items()},
            {name: largest(values) for name, values in (max or {}).items()},
            {name: -largest(-values) for name, values in (min or {}).items()},
        )

    @classmethod
    def merged(cls, parts: Sequence[TokenSums]) -> TokenSums:
        """Of the tokens of all parts, of which there is one at least; all have the same names."""
        first = parts[0]
        return cls(
            _stacked(part.tokens for part in parts).sum(),
            {name: _stacked(part.sums[name] for part in parts).sum() for name in first.sums},
            {name: _stacked(part.max[name] for part in parts).amax() for name in first.max},
            {name: _stacked(part.min[name] for part in parts).amin() for name in first.min},
        )

    def metrics(self) -> dict[str, float]:
        """Means over the tokens and extremes, by name; nothing where there is no token. Waits for
        the device once."""
        every = {**self.sums, **self.max, **self.min}
        tokens, *values = _stacked([self.tokens, *every.values()]).tolist()
        if not tokens:
            return {}
        found = dict(zip(every, values, strict=True))
        return found | {name: found[name] / tokens for name in self.sums}


def _stacked(scalars: Iterable[Tensor]) -> Tensor:
    return torch.stack([*scalars])
