"""The layouts that fit a cluster, the fastest first.

Every combination of the degrees in ``plan.search`` is judged by the checks that a training run
makes (``config_checks.run_problems``), then by its memory, then by its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_m1.config import TrainConfig
from megatron_m1.config_checks import model_layout_problems, run_problems
from megatron_m1.errors import ConfigError
from megatron_m1.planning import memory
from megatron_m1.planning.config import RECOMPUTE, PlanConfig, plan_problems
from megatron_m1.planning.cost import StepCost, step_cost
from megatron_m1.planning.layer_time import LayerTimes
from megatron_m1.planning.memory import GIB, Memory
from megatron_m1.planning.stages import cut_with_head
from parallel.layout import Layout

_DEGREES = ("tp", "pp", "ep", "etp", "cp")


@dataclass(frozen=True)
class Candidate:
    """A layout that can run, with what it needs and takes."""

    config: PlanConfig
    memory: Memory
    cost: StepCost

    @property
    def fits(self) -> bool:
        """Whether a GPU of the plan holds it."""
        return self.memory.total <= self.config.plan.usable_gb * GIB

    @property
    def recompute(self) -> str:
        """In the words of ``plan.search.recompute``."""
        train = self.config.train
        modules = train.recompute_modules if train.recompute == "selective" else []
        return "+".join(sorted(modules)) or train.recompute

    def overrides(self) -> list[str]:
        """What to give ``megatron_m1.pretrain`` for it."""
        layout, train = self.config.parallel, self.config.train
        given = [f"parallel.{name}={getattr(layout, name)}" for name in _DEGREES]
        if layout.vpp:
            given.append(f"parallel.vpp={layout.vpp}")
        if layout.pipeline_layout:
            given.append(f"parallel.pipeline_layout={layout.pipeline_layout}")
        given += [f"train.micro_batch={train.micro_batch}", f"train.recompute={train.recompute}"]
        if train.recompute == "selective":
            given.append(f"train.recompute_modules=[{','.join(train.recompute_modules)}]")
        return given


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        found: layouts that fit, the fastest first.
        judged: combinations that can run, but for their memory.
        tightest: the least memory in bytes that any of those needs.
        configured: the layout of ``parallel`` and ``train``, where it divides anything and can run.
    """

    found: list[Candidate]
    judged: int
    tightest: float
    configured: Candidate | None

    def is_configured(self, candidate: Candidate) -> bool:
        return self.configured is not None and candidate.config == self.configured.config

    def to_list(self) -> list[Candidate]:
        """What was found, and the configured layout where it is not among it."""
        more = [self.configured] if self.configured else []
        return self.found + [one for one in more if not any(map(self.is_configured, self.found))]


def search(config: PlanConfig) -> Search:
    """Every layout of ``plan.search`` that fits; with ``enabled=false`` the configured one.

    Raises:
        ConfigError: no combination can run, and why.
    """
    plan, model = config.plan, config.model
    _refuse(plan_problems(plan))
    configured = _configured(config)
    if not plan.search.enabled:
        _refuse(run_problems(config, plan.gpus))
        assert configured
        fitting = [configured] if configured.fits else []
        return Search(fitting, 1, configured.memory.total, configured)
    _refuse(_problems_without_degrees(config))
    known, found, judged, tightest = _KnownTimes(config), [], 0, math.inf
    reason = "give other degrees or nodes"
    for layout in _layouts(config, known):
        if model_layout_problems(model, layout):
            continue
        for train in _trains(config):
            candidate = replace(config, parallel=layout, train=train)
            if problems := run_problems(candidate, plan.gpus):
                reason = f"for example, {problems[0]}"
                continue
            needed = memory.estimate(candidate, plan.gpus)
            judged, tightest = judged + 1, min(tightest, needed.total)
            if needed.total <= plan.usable_gb * GIB:
                cost = step_cost(candidate, plan, known.of(layout, train))
                found.append(Candidate(candidate, needed, cost))
    if not judged:
        _refuse([f"plan.search divides {plan.gpus} GPUs in no way: {reason}"])
    found.sort(key=lambda candidate: candidate.cost.total)
    return Search(found, judged, tightest, configured)


def _configured(config: PlanConfig) -> Candidate | None:
    plan, searched = config.plan, config.plan.search.enabled
    if (searched and config.parallel.smallest_world == 1) or run_problems(config, plan.gpus):
        return None
    return Candidate(config, memory.estimate(config, plan.gpus), step_cost(config, plan))


class _KnownTimes:
    """The times of layers, computed once for all pipelines of them."""

    def __init__(self, config: PlanConfig) -> None:
        self._config = config
        self._times: dict[tuple, LayerTimes] = {}

    def of(self, layout: Layout, train: TrainConfig) -> LayerTimes:
        degrees = (layout.tp, layout.ep, layout.etp, layout.cp)
        key = (*degrees, train.micro_batch, train.recompute, *train.recompute_modules)
        if key not in self._times:
            config = replace(self._config, parallel=layout, train=train)
            self._times[key] = LayerTimes(config, config.plan.gpus, config.plan)
        return self._times[key]


def _problems_without_degrees(config: PlanConfig) -> list[str]:
    """What is wrong whatever the degrees are: with one GPU and rows one by one."""
    alone = replace(config, parallel=Layout(), train=replace(config.train, micro_batch=1))
    return run_problems(alone, 1)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _layouts(config: PlanConfig, known: _KnownTimes) -> Iterator[Layout]:
    plan, wanted = config.plan, config.plan.search
    given = replace(config.parallel, pipeline_layout=None)
    for tp, pp, vpp, ep, etp, cp in product(
        wanted.tp, wanted.pp, wanted.vpp, wanted.ep, wanted.etp, wanted.cp
    ):
        layout = replace(given, tp=tp, pp=pp, ep=ep, etp=etp, cp=cp, vpp=vpp if vpp > 1 else None)
        if layout.problems(plan.gpus):
            continue
        yield layout
        head = known.of(layout, config.train).head_in_layers
        lighter = cut_with_head(config.model.num_layers, pp, vpp, head)
        if lighter:
            yield replace(layout, pipeline_layout=lighter)


def _trains(config: PlanConfig) -> Iterator[TrainConfig]:
    wanted = config.plan.search
    for rows, recompute in product(wanted.micro_batch, wanted.recompute):
        name, modules = RECOMPUTE[recompute]
        modules = modules or config.train.recompute_modules
        yield replace(config.train, micro_batch=rows, recompute=name, recompute_modules=modules)
