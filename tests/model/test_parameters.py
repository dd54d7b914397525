"""How parameters are cut, marked and started."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_m1.checkpoint.mapping import Copy, GateUp, QueryGroups
from megatron_m1.model.build import build_chunks
from megatron_m1.model.config import InitConfig, ModelConfig
from megatron_m1.model.init import initial_tensor, initialize
from megatron_m1.model.parameters import load_parameters, local_parameters
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=24,
    num_experts=4,
    vocab_size=96,
    layer_pattern="LS",
)
DEEPNORM_GAIN = (8 * MODEL.num_layers) ** -0.25


def build(layout: Layout, seed: int) -> nn.Module:
    (chunk,) = build_chunks(MODEL, transformer_config(MODEL, layout), seed=seed)
    return chunk


def test_every_parameter_is_marked(single_process: Layout) -> None:
    """A parameter is cut over the tensor-parallel ranks, or a copy on each; and the copies whose
    ranks see different tokens under sequence parallelism say so."""
    for local in local_parameters(build(single_process, seed=1), MODEL):
        parameter, name = local.parameter, local.mapped.ours
        is_cut = local.mapped.operation.axis is not None
        assert getattr(parameter, "tensor_model_parallel", False) == is_cut, name
        assert is_cut or hasattr(parameter, "sequence_parallel"), name
        assert getattr(parameter, "allreduce", True) == (not local.mapped.is_expert), name
        if is_cut:
            by_columns = "linear_proj" in name or "linear_fc2" in name
            assert parameter.partition_dim == int(by_columns), name


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


OPERATIONS = {
    "copy": (Copy(0), [(24, 32)], (24, 32)),
    "gate and up": (GateUp(), [(24, 32), (24, 32)], (48, 32)),
    "query groups": (QueryGroups(), [(64, 32), (32, 32), (32, 32)], (128, 32)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_inverted(name: str) -> None:
    operation, shapes, parameter_shape = OPERATIONS[name]
    tensors = random_tensors(*shapes)
    parameter = operation.pack(tensors, MODEL).reshape(parameter_shape)
    back = operation.unpack(operation.view(parameter, MODEL), MODEL)
    for given, found in zip(tensors, back, strict=True):
        assert torch.equal(given, found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_parts_join_to_the_whole(name: str) -> None:
    """The views of two tensor-parallel ranks' parameters, side by side, are the packed tensor."""
    operation, shapes, (rows, columns) = OPERATIONS[name]
    packed = operation.pack(random_tensors(*shapes), MODEL)
    parameters = [part.reshape(rows // 2, columns) for part in packed.chunk(2, operation.axis)]
    views = [operation.view(parameter, MODEL) for parameter in parameters]
    assert torch.equal(torch.cat(views, operation.axis), packed)


def test_a_rank_has_whole_query_groups() -> None:
    """Megatron's order: the queries of a key/value head, its key, its value, then the next."""
    q, k, v = (torch.arange(n).float()[:, None].expand(-1, 32) for n in (64, 32, 32))
    packed = QueryGroups().pack([q, k + 100, v + 200], MODEL)
    first = packed[0, :, 0].tolist()
    assert first == [*range(32), *range(100, 116), *range(200, 216)]


def test_same_seed_same_weights(single_process: Layout) -> None:
    first, same, other = (dict(build(single_process, s).named_parameters()) for s in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name]), name
        assert parameter.dim() == 1 or not torch.equal(parameter, other[name]), name


def test_loading_fills_every_parameter(single_process: Layout) -> None:
    chunk = build(single_process, seed=1)
    for parameter in chunk.parameters():
        nn.init.constant_(parameter, float("nan"))
    load_parameters(chunk, MODEL, lambda name, shape: torch.ones(shape))
    assert all((parameter == 1).all() for parameter in chunk.parameters())
    initialize(chunk, MODEL, seed=1)
    assert all(parameter.isfinite().all() for parameter in chunk.parameters())


WIDE = replace(MODEL, hidden_size=256, ffn_hidden_size=512)


@pytest.mark.parametrize(
    ("name", "shape", "gain"),
    [
        ("lm_head.weight", (1024, 256), 1.0),
        ("model.layers.1.self_attn.q_proj.weight", (512, 256), 1.0),
        ("model.layers.1.self_attn.v_proj.weight", (256, 256), DEEPNORM_GAIN),
        ("model.layers.0.self_attn.out_proj.weight", (256, 512), DEEPNORM_GAIN),
        ("model.layers.0.self_attn.output_gate.weight", (512, 256), 1.0),
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", (512, 256), DEEPNORM_GAIN),
    ],
)
def test_spread_is_xaviers_with_deepnorms_gain(
    name: str, shape: tuple[int, int], gain: float
) -> None:
    weight = initial_tensor(name, shape, WIDE, seed=3)
    assert weight.std() == pytest.approx(gain * (2 / sum(shape)) ** 0.5, rel=0.02)
    assert abs(weight.mean()) < 0.02 * weight.std()


def test_gain_of_fused_qkv_is_on_the_values_only() -> None:
    name, shape = "model.layers.0.self_attn.qkv_proj.weight", (3 * 4 * 16, 256)
    plain = replace(WIDE, init=InitConfig(deepnorm_gain=False))
    ratio = initial_tensor(name, shape, WIDE, 3) / initial_tensor(name, shape, plain, 3)
    for head in ratio.view(4, 3 * 16, 256):
        torch.testing.assert_close(head[:32], torch.ones(32, 256))
        torch.testing.assert_close(head[32:], torch.full((16, 256), DEEPNORM_GAIN))


def test_truncated_normal_ends_at_three_deviations() -> None:
    init = InitConfig(method="truncated_normal", std=0.02, deepnorm_gain=False)
    weight = initial_tensor("lm_head.weight", (2048, 256), replace(WIDE, init=init), seed=3)
    assert weight.abs().max() <= 0.06
    # A normal cut at three deviations keeps 0.9866 of its own.
    assert weight.std() == pytest.approx(0.02 * 0.9866, rel=0.02)


def test_norms_start_at_one() -> None:
    assert torch.equal(initial_tensor("model.norm.weight", (32,), MODEL, 1), torch.ones(32))
