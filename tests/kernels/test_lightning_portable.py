"""The portable path across its segments and groups of heads, which are made short here."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.lightning import chunks, lightning_attention, portable
from kernels.lightning.chunks import Cut, Decays
from tests.kernels.compare import outputs_and_gradients, relative_error

H, D, DV = 5, 8, 6
CHUNK, MOST = 4, 3
DECAY = torch.tensor([0.0, 0.004, 0.5, 9.0, 1e4])
NAMES = {"o": 2, "final_state": 1, "dq": 2, "dk": 2, "dv": 2, "d_initial_state": 1}


@pytest.fixture(autouse=True)
def small_cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Segments of three chunks of four tokens, heads in groups of two."""
    monkeypatch.setattr(chunks, "CHUNK", CHUNK)
    monkeypatch.setattr(chunks, "SEGMENT", CHUNK * MOST)
    monkeypatch.setattr(chunks, "TILE", CHUNK * MOST * 2 * D)
    cut = Cut.of(torch.empty(1, CHUNK * MOST, H, D), D, None, False)
    assert [segment.chunks for segment in cut.segments] == [MOST]
    assert [heads.stop - heads.start for heads in cut.heads] == [2, 2, 1]
    yield


def make_inputs(T: int, N: int, state: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    inputs = [torch.randn(1, T, H, width, dtype=torch.float64) for width in (D, D, DV)]
    inputs += [torch.randn(N, H, D, DV, dtype=torch.float64)] if state else []
    return [x.to(dtype) for x in inputs]


def int32(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def run(inputs: list[Tensor], bounds: list[int], backend: str, final: bool) -> dict[str, Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> Any:
        return lightning_attention(
            q,
            k,
            v,
            DECAY,
            cu_seqlens=int32(bounds),
            initial_state=state,
            return_final_state=final,
            backend=backend,
        )

    outputs, gradients = outputs_and_gradients(function, inputs)
    names = [name for name in NAMES if final or name != "final_state"]
    return dict(zip(names, outputs + gradients, strict=False))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        error = relative_error(tensor, expected[name], NAMES[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


ROWS = [
    # One document: whole segments, whole chunks, a short one, and each alone.
    [0, 0],
    [0, 3],
    [0, 7],
    [0, 12],
    [0, 35],
    # Borders at the edge of a segment, of a chunk, inside chunks; several in one; empty documents.
    [0, 12, 24],
    [0, 4, 8, 32],
    [0, 5, 6, 7, 30, 31],
    [0, 0, 0, 11, 11, 13, 29, 29],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
]


@pytest.mark.parametrize("states", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_segments_match_the_recurrence(bounds: list[int], states: tuple[bool, bool]) -> None:
    initial, final = states
    inputs = make_inputs(bounds[-1], len(bounds) - 1, initial)
    expected = run(inputs, bounds, "reference", final)
    assert_equal(run(inputs, bounds, "portable", final), expected, 1e-12)
    single = [x.float() for x in inputs]
    assert_equal(run(single, bounds, "portable", final), expected, 2e-6)


def test_cuts_of_the_size_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds = [0, 300, 301, 2000, 2177]
    inputs = make_inputs(bounds[-1], 4, True)
    q, k, v, _ = inputs
    cut = Cut.of(q, D, bounds, False)
    assert [(s.chunks, s.size) for s in cut.segments] == [(32, 32), (32, 32), (4, 32), (1, 1)]
    expected = run(inputs, bounds, "reference", True)
    assert_equal(run(inputs, bounds, "portable", True), expected, 1e-12)


@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_every_token_is_in_one_segment(bounds: list[int]) -> None:
    q = torch.empty(1, bounds[-1], H, D)
    for by_document in (False, True):
        cut = Cut.of(q, D, bounds, by_document)
        tokens = [t for s in cut.segments for t in range(s.tokens.start, s.tokens.stop)]
        assert tokens == list(range(bounds[-1]))
        for number, segment in enumerate(cut.segments):
            assert segment.number == number
            assert segment.tokens.stop - segment.tokens.start == segment.chunks * segment.size
            assert segment.chunks <= MOST and segment.size < 2 * CHUNK


def test_decays_are_powers_within_a_document() -> None:
    bounds, size = [0, 2, 5, 5, 9, 12], 4
    cut = Cut.of(torch.empty(1, 12, H, D), D, bounds, False)
    (segment,) = cut.segments
    table = Decays.of(DECAY, 3, size, torch.float64).within(segment.documents)
    document = [n for n, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)]

    def power(to: int, since: int) -> Tensor:
        """From the state or the key of token `since` to token `to`; -1 is before the row."""
        same = document[max(to, 0)] == document[max(since, 0)]
        return torch.exp(-DECAY.double() * (to - since)) * same

    assert_same = partial(torch.testing.assert_close, rtol=1e-14, atol=0)
    scores, queries, keys = (x.unflatten(0, (H, 3)) for x in table[:3])
    for m in range(3):
        begin = m * size
        for i in range(size):
            assert_same(queries[:, m, i, 0], power(begin + i, begin - 1))
            assert_same(keys[:, m, i, 0], power(begin + size - 1, begin + i))
            for j in range(size):
                expected = power(begin + i, begin + j) if j <= i else torch.zeros(H)
                assert_same(scores[:, m, i, j], expected.double())
        edge = begin - 1
        assert_same(table.cross_HM1[:, m, 0], power(edge + size, edge))
        for n in range(3):
            expected = power(edge, n * size + size - 1) if n < m else torch.zeros(H)
            assert_same(table.carry_HMM[:, m, n], expected.double())


def call_backward(
    inputs: list[Tensor],
    bounds: list[int],
    d_o: Tensor | None,
    d_final: Tensor | None,
    gradients: tuple[Tensor, ...],
) -> Tensor | None:
    q, k, v, initial = inputs
    cu_seqlens = int32(bounds)
    _, _, kept = portable.forward(q, k, v, DECAY, cu_seqlens, initial, True, False, True)
    options = (DECAY, cu_seqlens, initial, kept, False, *gradients, True)
    return portable.backward(d_o, d_final, q, k, v, *options)


@pytest.mark.parametrize("bounds", [[0, 29], [0, 10, 29]])
def test_gradients_are_written_into_slices(bounds: list[int]) -> None:
    inputs = make_inputs(29, len(bounds) - 1, True)
    d_o, d_final = torch.randn_like(inputs[2]), torch.randn_like(inputs[3])
    apart = tuple(torch.empty_like(x) for x in inputs[:3])
    d_initial = call_backward(inputs, bounds, d_o, d_final, apart)
    # One more column on either side, which nobody may touch.
    buffer = torch.full((29, H, 2 * D + DV + 2), 7.0, dtype=torch.float64)[None]
    slices = buffer[..., 1:-1].split((D, D, DV), dim=-1)
    assert torch.equal(call_backward(inputs, bounds, d_o, d_final, slices), d_initial)
    for written, expected in zip(slices, apart, strict=True):
        assert torch.equal(written, expected)
    assert (buffer[..., [0, -1]] == 7).all()


def test_missing_gradients_are_zero() -> None:
    inputs, bounds = make_inputs(29, 1, True), [0, 29]
    zero_o, zero_final = torch.zeros_like(inputs[2]), torch.zeros_like(inputs[3])
    for d_o, d_final in ((None, torch.randn_like(zero_final)), (torch.randn_like(zero_o), None)):
        given, expected = (tuple(torch.empty_like(x) for x in inputs[:3]) for _ in range(2))
        d_initial = call_backward(inputs, bounds, d_o, d_final, given)
        full = (zero_o if d_o is None else d_o, zero_final if d_final is None else d_final)
        assert torch.equal(d_initial, call_backward(inputs, bounds, *full, expected))
        assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("state", [False, True])
def test_a_second_backward_is_the_first(state: bool) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(29, 2, state)]
    o = lightning_attention(
        *inputs[:3], DECAY, cu_seqlens=int32([0, 9, 29]), initial_state=(inputs + [None])[3]
    )
    first, second = (torch.autograd.grad(o.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_kept_is_one_state_for_each_segment() -> None:
    q, k, v = make_inputs(29, 1, False)
    for cu_seqlens in (None, int32([0, 5, 29])):
        call = (q, k, v, DECAY, cu_seqlens, None, False, False)
        o, final, kept = portable.forward(*call, keep_states=True)
        assert final is None and kept.shape == (3, H, D, DV) and not kept[0].any()
        assert portable.forward(*call, keep_states=False)[2] is None


class NewMemory(TorchDispatchMode):
    """The sizes in bytes of what operations allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        storages = (x.untyped_storage() for x in tensors(result))
        self.sizes |= {x.nbytes() for x in storages if x.data_ptr() not in given}
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def test_nothing_but_results_grows_with_the_row() -> None:
    T = 960
    q, k, v = make_inputs(T, 1, False)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    with NewMemory() as memory:
        for bounds in ([0, T], [0, 50, T]):
            call = (q, k, v, DECAY, int32(bounds))
            o, _, kept = portable.forward(*call, None, False, True, True)
            portable.backward(o, None, *call, None, kept, True, *gradients, False)
            portable.state(k, v, *call[3:], True)
            portable.state_gradient(q, v, *call[3:], True)
    assert {o.nbytes, kept.nbytes} <= memory.sizes
    documents = (T + 1) * 8
    assert max(memory.sizes - {o.nbytes, kept.nbytes}) == documents < q.nbytes / 32
