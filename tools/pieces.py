"""Where the time of a training step goes, by pieces of the model, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_m1.model.build import MiniMaxM1
from megatron_m1.model.lightning_attention import LightningAttention
from megatron_m1.model.moe import MoE
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.softmax_attention import SoftmaxAttention

_MARK = "piece: "


def _pieces(model: nn.Module) -> dict[nn.Module, str]:
    """Which module opens which piece. A module inside another takes its time out of the outer."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, MiniMaxM1):
            found[module] = "head and loss"
            found[module.decoder] = "residuals"
        elif isinstance(module, LightningAttention):
            found[module] = "lightning attention"
        elif isinstance(module, SoftmaxAttention):
            found[module] = "softmax attention"
        elif isinstance(module, MoE):
            found[module] = "routing"
            found[module.experts] = "experts"
        elif isinstance(module, RMSNorm):
            found[module] = "norms"
        elif name.endswith((".linear_qkv", ".linear_gate", ".linear_proj")):
            found[module] = "projections"
        elif name.endswith("embedding"):
            found[module] = "embedding"
    return found


def time_by_piece(model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
    """Run ``step`` (forward, backward, update) and return the seconds spent in each piece."""
    ranges: list[record_function] = []

    def enter(module: nn.Module, *inputs: object) -> None:
        ranges.append(record_function(_MARK + pieces[module]))
        ranges[-1].__enter__()

    def leave(module: nn.Module, *inputs: object) -> None:
        ranges.pop().__exit__(None, None, None)

    pieces = _pieces(model)
    hooks = [module.register_forward_pre_hook(enter) for module in pieces]
    hooks += [module.register_forward_hook(leave) for module in pieces]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    for hook in hooks:
        hook.remove()
    return _attribute(profiler.events())


def _attribute(events: list[FunctionEvent]) -> dict[str, float]:
    """Forward operations belong to the range around them, backward nodes to the piece whose forward
    operation made them: both carry autograd's sequence number."""
    made_by: dict[int, str] = {}
    for event in events:
        piece = _enclosing(event)
        if piece and event.sequence_nr >= 0 and not _root(event).name.startswith("autograd::"):
            made_by[event.sequence_nr] = piece
    seconds: Counter[str] = Counter()
    for event in events:
        piece = _enclosing(event) or made_by.get(_root(event).sequence_nr) or "gradients, update"
        seconds[piece] += event.self_cpu_time_total / 1e6
    return dict(seconds.most_common())


def _enclosing(event: FunctionEvent | None) -> str | None:
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK)
        event = event.cpu_parent
    return None


def _root(event: FunctionEvent) -> FunctionEvent:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event
