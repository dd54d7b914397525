"""Decode steps and prefills onto a pool of states, against one call over the whole sequence."""

import pytest
import torch
from torch import Tensor

from kernels.lightning import lightning_attention
from kernels.lightning.decode import lightning_decode, lightning_prefill
from parallel import host
from tests.kernels.compare import relative_error

H, D, DV = 3, 12, 20
DECAY = torch.tensor([0.0, 0.1, 3.0])
SLOTS = 5


def make(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape, H, width, dtype=dtype) for width in (D, D, DV)]


def devices(backend: str, *tensors: Tensor) -> list[Tensor]:
    """Triton's kernels want the card where there is one; PyTorch's are checked beside it."""
    device = host.device() if backend == "fused" else torch.device("cpu")
    return [x.to(device) for x in tensors]


BACKENDS = ["portable", "fused"]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_gives_the_output_of_one_call(backend: str, silu: bool) -> None:
    """Two sequences of 9 and 7 tokens: prefills of 4 and 0, then 3 and 5, then steps."""
    lengths, prefills = (9, 7), [(4, 0), (3, 5)]
    sequences = [make(n) for n in lengths]
    states = torch.randn(SLOTS, H, D, DV)
    start, slots = states.clone(), torch.tensor([3, 1])
    decay, states, slots = devices(backend, DECAY, states, slots)
    produced: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for counts in prefills:
        spans = [slice(d, d + n) for d, n in zip(done, counts, strict=True)]
        parts = [[x[s] for x in seq] for seq, s in zip(sequences, spans, strict=True)]
        row = devices(backend, *(torch.cat(x)[None] for x in zip(*parts, strict=True)))
        cu_seqlens = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        o = lightning_prefill(
            *row, decay, states, slots, cu_seqlens=cu_seqlens, silu=silu, backend=backend
        )[0].cpu()
        for n, part in enumerate(o.split(list(counts))):
            produced[n].append(part)
            done[n] += counts[n]
    for _ in range(2):
        step = [torch.stack([sequences[n][x][done[n]] for n in (0, 1)]) for x in range(3)]
        o = lightning_decode(
            *devices(backend, *step), decay, states, slots, silu=silu, backend=backend
        ).cpu()
        for n in (0, 1):
            produced[n].append(o[n : n + 1])
            done[n] += 1
    assert tuple(done) == lengths

    for n, slot in enumerate((3, 1)):
        expected, final = lightning_attention(
            *(x[None].double() for x in sequences[n]),
            DECAY,
            initial_state=start[slot : slot + 1].double(),
            return_final_state=True,
            silu=silu,
            backend="reference",
        )
        assert relative_error(torch.cat(produced[n])[None], expected, 2) < 1e-6
        assert relative_error(states[slot][None].cpu(), final, 1) < 1e-6
    untouched = [0, 2, 4]
    assert torch.equal(states[untouched].cpu(), start[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_as_wide_as_the_models(backend: str) -> None:
    """Four steps of two sequences with 128 keys and values, from states that are far from zero."""
    width, slots = 128, torch.tensor([4, 1])
    q, k, v = (torch.randn(2, 4, H, width) for _ in range(3))
    start = 10 * torch.randn(SLOTS, H, width, width)
    decay, states, slots = devices(backend, DECAY, start.clone(), slots)
    steps = [devices(backend, *(x[:, t] for x in (q, k, v))) for t in range(4)]
    o = [lightning_decode(*step, decay, states, slots, backend=backend).cpu() for step in steps]
    expected, final = lightning_attention(
        *(x.double() for x in (q, k, v)),
        DECAY,
        initial_state=start[[4, 1]].double(),
        return_final_state=True,
        backend="reference",
    )
    assert relative_error(torch.stack(o, dim=1), expected, 2) < 1e-6
    assert relative_error(states[slots].cpu(), final, 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_filling_touches_no_state(backend: str) -> None:
    q, k, v = make(3)
    states = torch.randn(SLOTS, H, D, DV)
    before = states.clone()
    tensors = devices(backend, q, k, v, DECAY, states, torch.tensor([-1, 4, -1], dtype=torch.int32))
    o = lightning_decode(*tensors, backend=backend).cpu()
    assert not o[0].any() and not o[2].any() and o[1].any()
    after = tensors[4].cpu()
    assert torch.equal(after[:4], before[:4]) and not torch.equal(after[4], before[4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [slice(0, 5), slice(1, 4), slice(0, 5, 2), slice(3, 4)])
def test_a_slice_of_the_pool_is_its_slots(slots: slice, backend: str) -> None:
    numbers = torch.arange(SLOTS)[slots]
    q, k, v = make(len(numbers))
    states = torch.randn(SLOTS, H, D, DV)
    by_number = devices(backend, q, k, v, DECAY, states, numbers)
    by_slice = devices(backend, q, k, v, DECAY, states.clone())
    expected = lightning_decode(*by_number, silu=True, backend=backend)
    o = lightning_decode(*by_slice, slots, silu=True, backend=backend)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(by_slice[4], by_number[4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_strided_inputs(backend: str) -> None:
    qkv = torch.randn(2, H, 3 * D).bfloat16()
    q, k, v = qkv.chunk(3, dim=-1)
    states = torch.zeros(SLOTS, H, D, D)
    slots = torch.tensor([2, 0])
    tensors = devices(backend, q, k, v, DECAY, states, slots)
    o = lightning_decode(*tensors, backend=backend).cpu()
    expected = (q.float() * k.float()).sum(-1, keepdim=True) * v.float()
    assert o.dtype == torch.bfloat16
    assert relative_error(o, expected, 1) < 8e-3


def test_portable_decodes_in_float64() -> None:
    q, k, v = make(1, dtype=torch.float64)
    states = torch.zeros(1, H, D, DV, dtype=torch.float64)
    o = lightning_decode(q, k, v, DECAY, states, torch.tensor([0]))
    assert o.dtype == torch.float64
    assert torch.allclose(states[0], k[0, :, :, None] * v[0, :, None], rtol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, H)}, r"q and k must be \[S, H, D\]"),
        ({"v": torch.zeros(2, H, DV).double()}, "share one floating dtype"),
        ({name: torch.ones(2, H, D).long() for name in "qkv"}, "share one floating dtype"),
        ({"decay": -DECAY}, "finite slopes s >= 0"),
        ({"decay": DECAY[:2]}, r"decay must be float32 of shape \[3\]"),
        ({"states": torch.zeros(SLOTS, H, D, D)}, r"shape \['P', 3, 12, 20\]"),
        ({"states": torch.zeros(SLOTS, H, DV, D).mT}, "contiguous"),
        ({"slots": torch.tensor([0])}, r"of shape \[2\]"),
        ({"slots": slice(0, 3)}, r"of shape \[2\]"),
        ({"slots": torch.tensor([1, SLOTS])}, r"slots must differ and be in 0..4, got \[1, 5\]"),
        ({"slots": torch.tensor([3, 3])}, r"slots must differ and be in 0..4, got \[3, 3\]"),
        ({"slots": torch.tensor([0.0, 1.0])}, "int32 or int64"),
        ({"backend": "magic"}, "got 'magic'"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    q, k, v = make(2)
    good = {"q": q, "k": k, "v": v, "decay": DECAY}
    good |= {"states": torch.zeros(SLOTS, H, D, DV), "slots": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        lightning_decode(**good | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 3, H, D).double()}, "contiguous torch.float64"),
        ({"q": torch.zeros(3, H, D)}, r"q and k must be \[B, T, H, D\]"),
        ({"states": torch.zeros(SLOTS, H, D, D)}, r"shape \['P', 3, 12, 20\]"),
        ({"states": torch.zeros(SLOTS, H, D, DV).double()}, "contiguous torch.float32"),
        ({"states": torch.zeros(SLOTS, H, D, DV, device="meta")}, "states on meta"),
        ({"slots": torch.tensor([0])}, r"of shape \[2\]"),
        ({"slots": torch.tensor([0.0, 1.0])}, "int32 or int64"),
        ({"slots": torch.tensor([0, -1])}, r"slots must differ and be in 0..4, got \[0, -1\]"),
    ],
)
def test_bad_prefill(changes: dict, message: str) -> None:
    q, k, v = make(1, 3)
    good = {"q": q, "k": k, "v": v, "decay": DECAY}
    good |= {"states": torch.zeros(SLOTS, H, D, DV), "slots": torch.tensor([0, 1])}
    good |= {"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}
    before = good["states"].clone()
    with pytest.raises(ValueError, match=message):
        lightning_prefill(**good | changes)
    assert torch.equal(good["states"], before)
