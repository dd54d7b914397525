"""How long one micro-batch takes in one layer, and in the head: computing and exchanging.

A piece takes its operations over the peak that its kernels reach, or the bytes that it moves over
the memory bandwidth, whichever is longer. Passes are ``forward`` and ``backward`` of a layer;
``again`` is what recomputation repeats.

Shapes: n tokens of the micro-batch on one context-parallel rank; C width, D head size, K key/value
heads, F expert FFN width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megatron_m1.config import RunConfig
from megatron_m1.model.config import LIGHTNING, SOFTMAX
from megatron_m1.planning.activations import WIDTH, local_tokens
from megatron_m1.planning.communication import Groups
from megatron_m1.planning.config import Plan
from megatron_m1.planning.flops import blocked_lightning
from megatron_m1.planning.memory import layer_experts
from megatron_m1.planning.seconds import Seconds

_FP32 = 4
_CHUNK = 64
"""Tokens of a chunk of lightning attention on a GPU (``kernels.lightning.fused``)."""
_TENSORS_FORWARD, _TENSORS_BACKWARD = 4, 7
"""Tensors of n H D numbers that lightning attention must move: q k v o; q k v do dq dk dv."""
_FLASH_BACKWARD = 2.5
"""Products of flash attention's backward over its forward (arXiv 2307.08691, section 4.1)."""


@dataclass
class LayerTime:
    """Seconds of one layer (or of the head) for one micro-batch, by piece."""

    forward: Seconds = field(default_factory=Seconds)
    backward: Seconds = field(default_factory=Seconds)
    again: Seconds = field(default_factory=Seconds)

    def total(self) -> Seconds:
        return Seconds().add(self.forward).add(self.backward).add(self.again)


class LayerTimes:
    """The times of a configuration's layers on a cluster. The pipeline's degrees do not matter."""

    def __init__(self, config: RunConfig, world_size: int, plan: Plan) -> None:
        self.model, self.layout, self.train = config.model, config.parallel, config.train
        self.plan, self.groups = plan, Groups.of(config.parallel, world_size)
        self.tokens = local_tokens(config)
        self.width = WIDTH[config.train.precision]
        self.document = min(plan.document_length or self.train.seq_length, self.train.seq_length)
        peak = plan.bf16_tflops if self.train.precision == "bf16" else plan.fp32_tflops
        self._peak, self._fp32 = peak * 1e12, plan.fp32_tflops * 1e12 * plan.efficiency.fp32
        self._bandwidth = plan.hbm_tb_per_s * 1e12

    @cached_property
    def layers(self) -> dict[str, Seconds]:
        """Whole passes of a layer of each kind."""
        return {kind: self.layer(kind).total() for kind in set(self.model.layer_kinds)}

    @cached_property
    def head(self) -> Seconds:
        """Whole passes of the LM head, the loss included."""
        return self._head().total()

    @cached_property
    def head_in_layers(self) -> float:
        """The time of the head in mean layers."""
        kinds = self.model.layer_kinds
        layers = sum(self.layers[kind].total() for kind in kinds)
        return self.head.total() * len(kinds) / layers

    def layer(self, kind: str) -> LayerTime:
        """One layer of a kind, with the recomputation that is chosen."""
        mixer, moe = self._mixer(kind), self._moe()
        both = LayerTime(
            Seconds(mixer.forward).add(moe.forward), Seconds(mixer.backward).add(moe.backward)
        )
        if self.layout.overlap_moe_expert_parallel_comm:
            # Tokens of one micro-batch travel while another one computes.
            for seconds in (both.forward, both.backward):
                seconds["ep"] = max(0.0, 2 * seconds["ep"] - seconds.total())
        if self.train.recompute == "full":
            both.again = _renamed(both.forward)
        elif self.train.recompute == "selective":
            if "core_attn" in self.train.recompute_modules and kind != LIGHTNING:
                core = {"attention", "cp"} & mixer.forward.keys()
                both.again.add(_renamed({piece: mixer.forward[piece] for piece in core}))
            if "moe" in self.train.recompute_modules:
                both.again.add(_renamed(moe.forward))
        return both

    def _head(self) -> LayerTime:
        """One pass makes loss and gradients."""
        model, plan = self.model, self.plan
        flops = 3 * 2.0 * model.vocab_size * model.hidden_size * self._share()
        if model.fp32_lm_head:
            seconds, width = flops / self._fp32, _FP32
        else:
            seconds, width = flops / (self._peak * plan.efficiency.matmul), self.width
        row = self.tokens * model.hidden_size * width
        weight = model.vocab_size * model.hidden_size / self.layout.tp
        gradient = self._moved(weight * (2 * width + 2 * _FP32))
        tp = self.groups.tp.ring(plan, row)
        return LayerTime(
            Seconds(head=seconds / 3, tp=tp),
            Seconds(head=seconds * 2 / 3, gradients=gradient, tp=tp),
        )

    def _share(self) -> float:
        """Tokens for each of which a rank of tp does the whole work."""
        return self.tokens / self.layout.tp

    def _moved(self, size: float) -> float:
        return size / (self._bandwidth * self.plan.efficiency.memory)

    def _mixer(self, kind: str) -> LayerTime:
        model, plan, share = self.model, self.plan, self._share()
        flops = model.layer_flops(kind, self.document / 2)
        inner = model.num_attention_heads * model.head_dim
        projections = flops["projections"] * share / (self._peak * plan.efficiency.matmul)
        weights = model.attention_params(kind) / self.layout.tp
        gradients = self._moved(weights * self._gradient_bytes())
        # Norm, residual, and what stands between the projections: gate and norm, or rotation.
        between = (5 * model.hidden_size + (4 if kind == LIGHTNING else 6) * inner) * self.width
        elements = self._moved(between * share)
        forward = Seconds(projections=projections, elements=elements)
        backward = Seconds(projections=2 * projections, elements=2 * elements, gradients=gradients)
        if kind == SOFTMAX:
            core = flops["attention"] * share / (self._peak * plan.efficiency.attention)
            forward["attention"], backward["attention"] = core, _FLASH_BACKWARD * core
        else:
            forward["lightning"] = self._lightning(_TENSORS_FORWARD, 1.0)
            backward["lightning"] = self._lightning(_TENSORS_BACKWARD, _FLASH_BACKWARD)
        self._add_tensor_parallel(kind, forward, backward)
        self._add_context_parallel(kind, forward, backward)
        return LayerTime(forward, backward)

    def _lightning(self, tensors: int, products: float) -> float:
        plan, inner = self.plan, self.model.num_attention_heads * self.model.head_dim
        moved = tensors * inner * self.width * self._share()
        flops = products * blocked_lightning(self.model, _CHUNK) * self._share()
        return max(
            moved / (self._bandwidth * plan.efficiency.lightning),
            flops / (self._peak * plan.efficiency.attention),
        )

    def _add_tensor_parallel(self, kind: str, forward: Seconds, backward: Seconds) -> None:
        """Each column-parallel projection gathers its input; in the backward it gathers it again
        behind the product for its input's gradient, and scatters that behind the product for its
        weight's. The row-parallel one scatters, and gathers in the open (arXiv 2205.05198, section
        4.2). Without sequence parallelism an all-reduce costs what such a pair does."""
        row = self.tokens * self.model.hidden_size * self.width
        once = self.groups.tp.ring(self.plan, row)
        inner = self.model.num_attention_heads * self.model.head_dim
        groups = 2 * self.model.num_query_groups * self.model.head_dim
        columns = (3 * inner, inner) if kind == LIGHTNING else (inner + groups,)
        product = forward["projections"] / (sum(columns) + inner)
        forward["tp"] += (len(columns) + 1) * once
        backward["tp"] += once + 2 * sum(max(0.0, once - size * product) for size in columns)

    def _add_context_parallel(self, kind: str, forward: Seconds, backward: Seconds) -> None:
        """Softmax: the keys of every rank visit the others (at most) behind its computing, in the
        backward with FP32 gradients that travel home. Lightning: one all-gather of states each way
        (LASP+, MiniMax-01, section 3.2)."""
        model, plan, cp = self.model, self.plan, self.groups.cp
        if cp.size == 1:
            return
        if kind == SOFTMAX:
            heads = 2 * model.num_query_groups * model.head_dim / self.layout.tp
            visit = (cp.size - 1) * self.tokens * heads * min(1.0, self.document / self.tokens)
            out = cp.neighbour(plan, visit * self.width)
            back = cp.neighbour(plan, visit * (self.width + _FP32))
            forward["cp"] += max(0.0, out - forward["attention"])
            backward["cp"] += max(0.0, back - backward["attention"])
        else:
            states = model.num_attention_heads / self.layout.tp * model.head_dim**2 * _FP32
            # A rank holds two pieces of the row, and so gives up to two states.
            gathered = cp.ring(plan, 2 * cp.size * states)
            forward["cp"] += gathered
            backward["cp"] += gathered

    def _moe(self) -> LayerTime:
        model, plan, share = self.model, self.plan, self._share()
        flops = model.layer_flops(LIGHTNING, 0)
        weights = layer_experts(model, self.layout)
        read = self._moved(weights * self.width)
        product = flops["experts"] * share / (self._peak * plan.efficiency.experts)
        router = flops["router"] * share / self._fp32
        # Norm, residual and the router's FP32 copy; SwiGLU; rows in and out of expert order.
        chosen = model.router_topk * (3 * model.ffn_hidden_size + 4 * model.hidden_size)
        elements = self._moved((8 * model.hidden_size + chosen) * self.width * share)
        forward = Seconds(
            experts=max(product, read), router=router, elements=elements, ep=self._exposed(product)
        )
        backward = Seconds(
            experts=2 * max(product, read),
            router=2 * router,
            elements=2 * elements,
            gradients=self._moved(weights * self._gradient_bytes()),
            ep=self._exposed(2 * product),
        )
        return LayerTime(forward, backward)

    def _exposed(self, computing: float) -> float:
        """Seconds of sending tokens to their experts and back that the experts' own computing does
        not hide: with ``moe_overlap_groups`` P, one part in P is always under way alone."""
        model, layout, ep = self.model, self.layout, self.groups.ep
        rows = model.router_topk * model.hidden_size * self.width * self._share()
        once = 1.0
        if layout.moe_dispatcher == "deepep":
            # A token travels once to each node where it has experts, of those it chooses blindly.
            nodes = ep.size / ep.in_node(self.plan)
            once = nodes * (1 - (1 - 1 / nodes) ** model.router_topk) / model.router_topk
        messages = 2 * ep.all_to_all(self.plan, rows, once)
        messages += 2 * self.groups.etp.ring(self.plan, rows * layout.etp)
        parts = layout.moe_overlap_groups
        alone = messages / parts
        return alone + max(0.0, (messages - alone) - computing * (parts - 1) / parts)

    def _gradient_bytes(self) -> float:
        """Moved for a weight in each micro-batch: its gradient is written, read, and added to the
        FP32 sum, which Megatron's unfused accumulation reads and writes."""
        return 2 * self.width + 2 * _FP32


def _renamed(seconds: Mapping[str, float]) -> Seconds:
    """Recomputed work is one piece of its own, what it exchanges is not."""
    found = Seconds({piece: seconds[piece] for piece in ("tp", "ep", "cp") if piece in seconds})
    found["recomputed"] = sum(seconds.values()) - found.total()
    return found
