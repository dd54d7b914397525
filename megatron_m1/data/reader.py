"""The data of a run as a numbered sequence of rows: sample 0, 1, 2, ... without end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_m1.data.blend import Blend
from megatron_m1.data.packing import ConcatenatedPlan, PackedPlan, Plan, Source
from parallel.packing import PackedRow, concatenate


class Reader:
    """Random access to the samples of a run; each source rolls through its own shuffled epochs.

    The position in the data is one number, `consumed`: the samples that finished steps have used.
    The training loop moves it on after each step; it travels in `state_dict`.

    Raises ValueError for no sources, a source without anything to predict, or unfit weights.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_length: int,
        seed: int,
        pack_documents: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights were given for {len(sources)} data sources")
        self._blend = Blend(weights)
        plan_of = PackedPlan if pack_documents else ConcatenatedPlan
        self.plans: list[Plan] = [plan_of(source, seq_length, seed) for source in sources]
        for source, plan in zip(sources, self.plans, strict=True):
            if not len(plan):
                raise ValueError(f"data source {source.name} has no token to predict")
        self._identity: dict[str, Any] = {
            "seed": seed,
            "seq_length": seq_length,
            "pack_documents": pack_documents,
            "weights": weights,
            "sources": [[source.name, source.fingerprint] for source in sources],
        }
        self.consumed = 0

    def sample(self, index: int) -> PackedRow:
        """The row, `seq_length` positions, that is sample `index` >= 0 of the run."""
        source, within = self._blend.locate(index)
        epoch, row = divmod(within, len(self.plans[source]))
        return self.plans[source].row(row, epoch)

    def micro_batches(
        self, consumed: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int
    ) -> Iterator[PackedRow]:
        """This data-parallel rank's share of samples [consumed, consumed + global_batch).

        Each row yielded joins `micro_batch` samples. The ranks' shares together are exactly that
        range, however it is dealt. Raises ValueError when it cannot be dealt evenly.
        """
        stride = micro_batch * data_size
        if global_batch < 1 or stride < 1 or global_batch % stride:
            raise ValueError(
                f"a global batch of {global_batch} samples does not divide into micro-batches of "
                f"{micro_batch} on {data_size} data-parallel ranks: give a multiple of {stride}"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} is outside 0 to {data_size - 1}")
        first = consumed + data_rank * micro_batch
        return (
            concatenate([self.sample(start + i) for i in range(micro_batch)])
            for start in range(first, consumed + global_batch, stride)
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"consumed": self.consumed, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises ValueError when it is a position in other data."""
        for name, here in self._identity.items():
            if name == "sources":
                _check_sources(state[name], here)
            elif state[name] != here:
                raise ValueError(
                    f"the checkpoint's data has {name} {state[name]}, this run has {here}: resume "
                    f"with {state[name]}, or start another run_dir"
                )
        self.consumed = int(state["consumed"])


def _check_sources(saved: list[list[str]], here: list[list[str]]) -> None:
    if len(saved) != len(here):
        raise ValueError(
            f"the checkpoint's data sources are {', '.join(name for name, _ in saved)}; this run's "
            f"are {', '.join(name for name, _ in here)}: resume with the same ones"
        )
    for (saved_name, saved_print), (name, fingerprint) in zip(saved, here, strict=True):
        if saved_print != fingerprint:
            raise ValueError(
                f"data source {name} does not hold what the checkpoint was reading as {saved_name}:"
                " resume with the same files, or start another run_dir"
            )
