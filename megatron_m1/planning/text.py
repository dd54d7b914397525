"""The planner's answer as text, at most 100 columns wide."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_m1.planning import flops
from megatron_m1.planning.answer import LENGTHS, Answer, compared
from megatron_m1.planning.cost import EXCHANGES
from megatron_m1.planning.layouts import Candidate
from megatron_m1.planning.memory import GIB
from megatron_m1.planning.price import Price
from megatron_m1.planning.state import kv_elements, lightning_state_bytes

_MIB, _KIB = 2**20, 2**10
_HEAVY = 0.1
"""Share of a step above which the FP32 head is worth a remark."""


def describe(found: Answer) -> str:
    """Everything that was found."""
    sections = [_model(found), _operations(found), _lengths(found), _layouts(found)]
    if found.best:
        sections.append(_best(found, found.best))
    sections += [_decoding(found), _prices(found)]
    return "\n\n".join(section for section in sections if section)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[tuple[str, int]] = ()
) -> str:
    """Columns two spaces apart, the first to the left and the others to the right.

    Args:
        groups: titles over the columns after the first, each with how many it is over.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [_titles(groups, widths)] if groups else []
    for row in (head, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
    return "\n".join(lines)


def _titles(groups: Sequence[tuple[str, int]], widths: Sequence[int]) -> str:
    cells, start = [" " * widths[0]], 1
    for title, count in groups:
        width = sum(widths[start : start + count]) + 2 * (count - 1)
        cells.append(f" {title} ".center(width, "-"))
        start += count
    return "  ".join(cells)


def _model(found: Answer) -> str:
    model = found.config.model
    kinds = model.layer_kinds
    kv = 2 * kv_elements(model) / _KIB
    return "\n".join(
        [
            "# model",
            f"{model.name}: {model.num_params():,} parameters; {model.active_params():,} active a "
            "token",
            f"(without embedding and LM head); {kinds.count('L')} lightning and {kinds.count('S')} "
            "softmax layers",
            f"A sequence keeps {lightning_state_bytes(model) / _MIB:,.1f} MiB of states (FP32) and "
            f"{kv:,.2f} KiB of keys and values a token",
            f"({kv_elements(model):,} BF16 numbers)",
        ]
    )


def _operations(found: Answer) -> str:
    model, length = found.config.model, found.config.train.seq_length
    document = found.config.plan.document_length or length
    phases = (
        flops.training(model, document),
        {piece: amount / length for piece, amount in flops.prefill(model, length).items()},
        flops.decode(model, length),
    )
    sums = [sum(phase.values()) for phase in phases]
    rows = [
        [piece]
        + [
            cell
            for phase, whole in zip(phases, sums, strict=True)
            for cell in (f"{phase[piece] / 1e9:,.3f}", f"{phase[piece] / whole:.1%}")
        ]
        for piece in phases[0]
    ]
    rows.append(["all", *(cell for whole in sums for cell in (f"{whole / 1e9:,.3f}", ""))])
    head = ["", f"train {document:,}", "", f"prefill {length:,}", "", f"decode at {length:,}", ""]
    return f"# operations: GFLOP a token\n{table(head, rows)}"


def _lengths(found: Answer) -> str:
    rows = []
    for tokens in LENGTHS:
        at = compared(found.config.model, tokens)
        mine, _, r1 = at.generation
        rows.append(
            [f"{tokens // _KIB}K"]
            + [f"{amount / 1e9:,.0f}" for amount in at.decode]
            + [f"{amount / 1e15:,.2f}" for amount in at.generation]
            + [f"{mine / r1:.0%}", f"{mine / at.absorbed:.0%}"]
            + [f"{amount / GIB:,.2f}" for amount in at.state]
        )
    three = ["here", "softmax", "R1"]
    groups = [("decode, GFLOP", 3), ("generate, PFLOP", 5), ("state, GiB", 3)]
    return (
        "# lengths: against the same sizes with softmax attention alone, and DeepSeek-R1\n"
        f"{table(['tokens', *three, *three, 'of R1', 'absorbed', *three], rows, groups)}\n"
        "decode: the last token; generate: all of them one by one; state: what a sequence keeps;\n"
        "of R1: here over R1; absorbed: over R1 that computes attention in its latent"
    )


def _layouts(found: Answer) -> str:
    plan, train = found.config.plan, found.config.train
    nodes = "1 node" if plan.nodes == 1 else f"{plan.nodes} nodes"
    lines = [
        f"# layouts: {nodes} x {plan.gpus_per_node} {plan.gpu}, "
        f"{plan.gpu_memory_gb:g} GiB of which {plan.reserved_gb:g} are reserved; "
        f"{train.global_batch:,} rows x {train.seq_length:,} tokens",
        _how_many_fit(found),
    ]
    if not found.best:
        return "\n".join(lines)
    head = ["tp", "pp", "vpp", "ep", "etp", "cp", "rows", "recompute", "GiB", "s/step", "tok/s"]
    head += ["TF/s", "MFU", "idle", "tp+cp", "ep", "dp+pp"]
    shown = found.search.found[: plan.top]
    rows = [_layout_row(candidate) for candidate in shown]
    notes = [
        "rows: of a micro-batch; tok/s, TF/s: of a GPU; idle (bubble), tp+cp, ep, dp+pp: of a step"
    ]
    if any(candidate.config.parallel.pipeline_layout for candidate in shown):
        notes.append("*: stages of unequal layers, parallel.pipeline_layout")
    return "\n".join([*lines, table(head, rows), *notes, *_configured(found)])


def _configured(found: Answer) -> list[str]:
    given, plan = found.search.configured, found.config.plan
    if not given or not plan.search.enabled:
        return []
    needed, cost = given.memory.total / GIB, given.cost
    fits = "fits" if given.fits else "does not fit"
    return [
        f"as configured (parallel and train): {needed:.1f} GiB, which {fits}; {cost.total:.2f} "
        f"s/step, {cost.tflops:.0f} TF/s"
    ]


def _how_many_fit(found: Answer) -> str:
    plan, tightest = found.config.plan, found.search.tightest / GIB
    if not plan.search.enabled:
        fits = "fits" if found.best else "does not fit"
        needed = f"{tightest:.1f} GiB of {plan.usable_gb:g}"
        return f"# the layout that is configured {fits}: it needs {needed}"
    fitting = f"# {len(found.search.found):,} of {found.search.judged:,} combinations fit"
    if found.best:
        return fitting
    return f"{fitting}; the smallest needs {tightest:.1f} GiB: give more nodes, or more degrees"


def _layout_row(candidate: Candidate) -> list[str]:
    layout, cost = candidate.config.parallel, candidate.cost
    stages = f"{layout.pp}{'*' if layout.pipeline_layout else ''}"
    degrees = (layout.tp, stages, layout.vpp or 1, layout.ep, layout.etp, layout.cp)
    exchanges = (("bubble",), ("tp", "cp"), ("ep",), ("dp", "pp"))
    return [
        *map(str, degrees),
        str(candidate.config.train.micro_batch),
        candidate.recompute.removeprefix("core_"),
        f"{candidate.memory.total / GIB:.1f}",
        f"{cost.total:.2f}",
        f"{cost.tokens_per_second / cost.gpus:,.0f}",
        f"{cost.tflops:.0f}",
        f"{cost.mfu:.0%}",
        *(f"{cost.share(*pieces):.0%}" for pieces in exchanges),
    ]


def _best(found: Answer, best: Candidate) -> str:
    layout, plan = best.config.parallel, found.config.plan
    seconds = sorted(best.cost.seconds.items(), key=lambda item: -item[1])
    shares = [f"{name} {taken / best.cost.total:.1%}" for name, taken in seconds if taken > 0]
    memory = [f"{name} {size / GIB:.1f}" for name, size in best.memory.parts().items()]
    exchanged = best.cost.share(*EXCHANGES)
    lines = [
        "# the first of them" if plan.search.enabled else "# the layout",
        layout.describe(plan.gpus),
        *_wrapped("GiB on the fullest GPU: ", memory),
        *_wrapped("time: ", shares),
        f"{exchanged:.1%} of the step is exchanges that no computing hides",
        *_heavy_head(found, best),
        *_wrapped("overrides: ", [shlex.quote(word) for word in best.overrides()], " "),
    ]
    return "\n".join(lines)


def _heavy_head(found: Answer, best: Candidate) -> list[str]:
    share = best.cost.share("head")
    if not found.config.model.fp32_lm_head or share < _HEAVY:
        return []
    return [
        f"The FP32 head, without tensor cores, takes {share:.0%} of the step:",
        "model.fp32_lm_head=false multiplies in BF16, as MiniMax did in pre-training",
    ]


def _wrapped(label: str, words: Sequence[str], comma: str = ", ") -> list[str]:
    lines, line = [], label
    for number, word in enumerate(words):
        part = word if number == len(words) - 1 else word + comma
        if len(line) + len(part.rstrip()) > 100:
            lines.append(line.rstrip())
            line = " " * len(label)
        line += part
    return [*lines, line.rstrip()]


def _decoding(found: Answer) -> str:
    full, rl = found.decoding, found.config.plan.rl
    if not full:
        return ""
    memory = [f"{name} {size / GIB:.1f}" for name, size in full.memory.items()]
    return "\n".join(
        [
            f"# decoding: {full.gpus} GPUs hold the model and {full.sequences:,} sequences of "
            f"{rl.prompt_tokens + rl.response_tokens:,} tokens",
            *_wrapped("GiB on each: ", memory),
            f"{full.tokens_per_second:,.0f} tokens/s, {1e3 * full.step_seconds:.1f} ms a token",
        ]
    )


def _prices(found: Answer) -> str:
    plan, rows = found.config.plan, []
    if found.tokens_price:
        rows.append(_price_row(f"{found.tokens:,} tokens", found.tokens_price))
    if found.days_price:
        rows.append(_price_row(f"{plan.days:g} days of the cluster", found.days_price))
    if found.rl:
        rows.append(_price_row(f"RL, {plan.rl.steps:,} rounds", found.rl.price))
    if not rows:
        return ""
    rent = plan.dollars_per_gpu_hour
    head = ["", "days", "GPU-hours", "dollars" if rent else ""]
    title = "# price" + (f" at ${rent:g} a GPU-hour" if rent else "")
    return "\n".join([title, table(head, rows), *_rl(found)])


def _price_row(name: str, price: Price) -> list[str]:
    dollars = "" if price.dollars is None else f"{price.dollars:,.0f}"
    return [name, f"{price.days:,.1f}", f"{price.gpu_hours:,.0f}", dollars]


def _rl(found: Answer) -> list[str]:
    if not found.rl:
        return []
    rl, decoding = found.rl, found.rl.rollout
    return [
        f"A round: generating {rl.generating:,.0f} s, scoring {rl.scoring:,.0f} s, training "
        f"{rl.training:,.0f} s;",
        f"{decoding.gpus} GPUs decode {decoding.batch:,} sequences together (of "
        f"{decoding.sequences:,} that fit), {1e3 * decoding.step_seconds:.1f} ms a token",
    ]
