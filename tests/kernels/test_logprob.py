"""Token log-probabilities without logits against the whole table of them in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.logprob import VocabSlice, summed_cross_entropy, token_logprobs
from tests.kernels.compare import outputs_and_gradients, relative_error
from tests.kernels.logprob_cases import (
    NAMES,
    assert_close,
    chunks_of,
    make_inputs,
    run,
    run_sum,
)

SHAPES = [(0, 3, 5), (1, 4, 1), (1, 8, 7), (6, 5, 33), (7, 1, 2), (50, 16, 101)]


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_matches_the_whole_table(
    shape: tuple[int, int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(rows, monkeypatch)
    hidden, weight, targets = make_inputs(*shape)
    expected = run(hidden, weight, targets, backend="reference")
    assert_close(run(hidden, weight, targets), expected, 1e-11)
    actual = run(hidden.float(), weight.float(), targets)
    assert_close(actual, expected, 5e-5, typical=0.5)


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_matches_the_whole_table(
    shape: tuple[int, int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(rows, monkeypatch)
    hidden, weight, targets = make_inputs(*shape)
    token_weights = torch.randn(len(targets), dtype=torch.float64)
    token_weights[1::3] = 0
    expected = run_sum(hidden, weight, targets, token_weights, backend="reference")
    assert_close(run_sum(hidden, weight, targets, token_weights), expected, 1e-11)
    actual = run_sum(hidden.float(), weight.float(), targets, token_weights.float())
    assert_close(actual, expected, 5e-5, typical=0.5)
    assert not actual["d_hidden"][1::3].any()


def test_reference_passes_gradcheck() -> None:
    hidden, weight, targets = make_inputs(4, 3, 5)
    token_weights = torch.randn(4, dtype=torch.float64)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for function in (
        lambda *x: token_logprobs(*x, targets, backend="reference"),
        lambda *x: summed_cross_entropy(*x, targets, token_weights, backend="reference"),
    ):
        assert torch.autograd.gradcheck(function, leaves)


def test_is_cross_entropy() -> None:
    hidden, weight, targets = make_inputs(9, 5, 11)
    losses = torch.nn.functional.cross_entropy(hidden @ weight.mT, targets, reduction="none")
    for backend in ("portable", "reference"):
        logprobs, entropy = token_logprobs(hidden, weight, targets, backend=backend)
        torch.testing.assert_close(logprobs, -losses)
        softmax = torch.distributions.Categorical(logits=hidden @ weight.mT)
        torch.testing.assert_close(entropy, softmax.entropy())


def test_entropy_is_left_out_where_it_is_not_wanted() -> None:
    hidden, weight, targets = make_inputs(9, 5, 11)
    wanted, _ = token_logprobs(hidden, weight, targets)
    for backend in ("portable", "reference"):
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, with_entropy=False, backend=backend
        )
        assert entropy is None
        torch.testing.assert_close(logprobs, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(output: int) -> None:
    hidden, weight, targets = make_inputs(9, 5, 11)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    gradients = [
        torch.autograd.grad(token_logprobs(*leaves, targets, backend=backend)[output].sum(), leaves)
        for backend in ("portable", "reference")
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected, 0) < 1e-11


@pytest.mark.parametrize("rows", [3, 512])
def test_one_repeated_target(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(rows, monkeypatch)
    hidden, weight, _ = make_inputs(12, 5, 11)
    targets = torch.full((12,), 10)
    expected = run(hidden, weight, targets, backend="reference")
    assert_close(run(hidden, weight, targets), expected, 1e-11)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_float32_whatever_the_inputs(hidden_dtype: torch.dtype) -> None:
    hidden, weight, targets = make_inputs(40, 64, 30, hidden_dtype)
    expected = run(hidden.double(), weight.double(), targets, backend="reference")
    for backend in ("portable", "reference"):
        actual = run(hidden, weight.float(), targets, backend=backend)
        assert actual["d_hidden"].dtype == hidden_dtype
        assert actual.pop("d_hidden").isfinite().all()
        assert {x.dtype for x in actual.values()} == {torch.float32}
        assert_close(actual, {name: expected[name] for name in actual}, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    hidden, weight, targets = make_inputs(40, 64, 30, dtype)
    expected = run(hidden.double(), weight.double(), targets, backend="reference")
    actual = run(hidden, weight, targets)
    assert actual["d_hidden"].dtype == actual["d_weight"].dtype == dtype
    assert_close(actual, expected, 4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_a_bfloat16_head_rounds_its_logits() -> None:
    hidden, weight, targets = make_inputs(40, 64, 30, torch.bfloat16)
    whole = {"product_dtype": torch.bfloat16}
    actual = run(hidden, weight, targets, **whole)
    logits = (hidden @ weight.mT).float()
    rounded = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(actual["logprobs"], rounded, rtol=1e-6, atol=1e-6)
    assert relative_error(actual["logprobs"], run(hidden, weight, targets)["logprobs"]) > 1e-4
    # The gradient of the logits is rounded too, on both sides.
    assert_close(actual, run(hidden, weight, targets, backend="reference", **whole), 2e-2)
    token_weights = torch.rand(40)
    sums = [
        run_sum(hidden, weight, targets, token_weights, backend=backend, **whole)
        for backend in ("portable", "reference")
    ]
    assert_close(*sums, 2e-2)


def extreme_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all magnitudes up to 1e4 of both signs, and targets with probability 1, 0 and
    between."""
    hidden = torch.tensor([[1e4], [-1e4], [1.0], [1e4], [1e-4], [0.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.5], [0.9999], [0.0], [1.0], [-0.25]])
    return hidden, weight, torch.tensor([0, 0, 1, 3, 2, 6])


def test_extreme_logits() -> None:
    hidden, weight, targets = extreme_inputs()
    expected = run(hidden.double(), weight.double(), targets, backend="reference")
    actual = run(hidden, weight, targets)
    assert all(x.isfinite().all() for x in actual.values())
    assert actual["logprobs"][1] < -1e4
    torch.testing.assert_close(
        actual["logprobs"].double(), expected["logprobs"], rtol=1e-6, atol=2e-3
    )
    torch.testing.assert_close(
        actual["entropy"].double(), expected["entropy"], rtol=2e-3, atol=1e-6
    )
    token_weights = torch.ones(len(targets))
    total = run_sum(hidden, weight, targets, token_weights)
    assert all(x.isfinite().all() for x in total.values())
    torch.testing.assert_close(total["total"], -actual["logprobs"].sum())


def test_shifted_logits_lose_nothing() -> None:
    """A constant far above the differences between logits: one log-sum-exp of float32 would leave
    three digits of the probabilities."""
    hidden, weight, targets = make_inputs(8, 3, 20, torch.float32)
    # Multiples of a power of two: the shifted logits are exact.
    weight, hidden = weight.mul(4).round().div(4), hidden.mul(16).round().div(16)
    shift = torch.full((20, 1), 8192.0)
    shifted = torch.cat((hidden, torch.ones(8, 1)), 1), torch.cat((weight, shift), 1)
    expected, actual = run(hidden, weight, targets), run(*shifted, targets)
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)
    actual["d_weight"] = actual["d_weight"][:, :3]
    torch.testing.assert_close(actual["d_weight"], expected["d_weight"], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes, and how many products it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        self.products += "mm" in function.__name__
        return result


def measured(function: Callable[..., Any], T: int, C: int, V: int) -> Largest:
    """Forward and backward."""
    hidden, weight, targets = make_inputs(T, C, V, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with Largest() as largest:
        result = function(*leaves, targets)
        total = result if isinstance(result, Tensor) else sum(x.sum() for x in result)
        torch.autograd.grad(total, leaves)
    return largest


@pytest.mark.parametrize(("summed", "products"), [(False, 4), (True, 3)])
def test_no_tensor_is_as_large_as_the_logits(
    summed: bool, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(8, monkeypatch)
    T, C, V = 64, 4, 96
    function = token_logprobs
    if summed:
        function = partial(summed_cross_entropy, token_weights=torch.ones(T))
    largest = measured(function, T, C, V)
    assert largest.elements == 8 * V
    assert largest.products == products * T // 8
    assert measured(partial(function, backend="reference"), T, C, V).elements == T * V


def test_saves_its_inputs_and_numbers_of_each_token() -> None:
    saved: list[Tensor] = []
    hidden, weight, targets = make_inputs(20, 4, 30)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    inputs = {x.data_ptr() for x in (hidden, weight, targets)}
    assert {x.numel() for x in saved if x.data_ptr() not in inputs} == {20}


def test_sum_without_gradients_multiplies_once() -> None:
    hidden, weight, targets = make_inputs(6, 4, 9)
    token_weights = torch.ones(6, dtype=torch.float64)
    expected = summed_cross_entropy(hidden, weight, targets, token_weights, backend="reference")
    for leaf, no_grad in ((weight, False), (weight.clone().requires_grad_(), True)):
        with torch.set_grad_enabled(not no_grad), Largest() as largest:
            total = summed_cross_entropy(hidden, leaf, targets, token_weights)
        assert largest.products == 1
        torch.testing.assert_close(total, expected)


def test_sum_gives_its_gradients_once() -> None:
    hidden, weight, targets = make_inputs(6, 4, 9)
    total = summed_cross_entropy(
        hidden.requires_grad_(), weight, targets, torch.ones(6, dtype=torch.float64)
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward\\(\\) once, or use token_logprobs"):
        total.backward()


def test_equal_inputs_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(16, monkeypatch)
    inputs = make_inputs(100, 48, 130, torch.float32)
    first, second = (run(*inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (run_sum(*inputs, torch.ones(100)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_any_strides() -> None:
    hidden, weight, targets = make_inputs(9, 6, 11)
    expected = run(hidden, weight, targets, backend="reference")
    strided = hidden.mT.contiguous().mT, weight.mT.contiguous().mT, targets.repeat(2, 1).mT[:, 0]
    assert_close(run(*strided), expected, 1e-11)
    token_weights = torch.rand(2, 9, dtype=torch.float64).mT[:, 0]
    expected = run_sum(hidden, weight, targets, token_weights, backend="reference")
    assert_close(run_sum(*strided, token_weights), expected, 1e-11)


def test_liger_gives_the_same_numbers() -> None:
    liger = pytest.importorskip("liger_kernel.ops")
    fused = liger.LigerFusedLinearScaledCrossEntropyFunction
    hidden, weight, targets = make_inputs(600, 24, 70, torch.float32)

    def theirs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses, entropy = fused.apply(hidden, weight, targets, return_entropy=True)
        return -losses, entropy

    outputs, gradients = outputs_and_gradients(theirs, (hidden, weight))
    expected = dict(zip(NAMES, outputs + gradients, strict=True))
    assert_close(run(hidden, weight, targets), expected, 1e-4)


def test_torch_gives_the_same_sum() -> None:
    hidden, weight, targets = make_inputs(60, 24, 70, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions()
    (total,), gradients = outputs_and_gradients(
        lambda *x: torch.nn.functional.linear_cross_entropy(
            *x, targets, reduction="sum", options=options
        ),
        (hidden, weight),
    )
    expected = dict(zip(("total", *NAMES[2:]), [total, *gradients], strict=True))
    assert_close(run_sum(hidden, weight, targets, torch.ones(60)), expected, 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "auto, portable, reference, got 'magic'"),
        ({"backend": "reference", "vocab_slice": VocabSlice()}, "takes the whole vocabulary"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int32)}, "must be floating point"),
        ({"hidden": torch.zeros(2, 5)}, r"hidden must be \[T, C\] and weight \[V, C\]"),
        ({"weight": torch.zeros(4)}, r"hidden must be \[T, C\] and weight \[V, C\]"),
        ({"weight": torch.zeros(0, 4)}, "at least one token"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, r"torch.int64 of shape \[2\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"torch.int64 of shape \[2\]"),
        ({"targets": torch.tensor([-1, 2])}, r"must be in 0..2, got -1 to 2"),
        ({"targets": torch.tensor([0, 3])}, r"must be in 0..2, got 0 to 3"),
        ({"weight": torch.zeros(3, 4, device="meta")}, "on one device, got cpu, meta and cpu"),
        ({"product_dtype": torch.int8}, "product_dtype must be floating point, got torch.int8"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments | changes)
    with pytest.raises(ValueError, match=message):
        summed_cross_entropy(token_weights=torch.ones(2), **arguments | changes)


@pytest.mark.parametrize(
    ("token_weights", "message"),
    [
        (torch.ones(3), r"torch.float32 of shape \[2\], got torch.float32 of shape \[3\]"),
        (torch.ones(2).double(), "got torch.float64"),
        (torch.ones(2, requires_grad=True), "must not require a gradient"),
    ],
)
def test_bad_token_weights(token_weights: Tensor, message: str) -> None:
    hidden, weight, targets = make_inputs(2, 4, 3, torch.float32)
    with pytest.raises(ValueError, match=message):
        summed_cross_entropy(hidden, weight, targets, token_weights)
