"""What keeps a configuration from running: every problem, as a sentence that names key and value.

``Layout.problems`` and ``ModelConfig.problems`` judge their own numbers; here is what lies between
the sections. No problem hides another, except that what rests on a wrong degree is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_m1.config import (
    GenerateConfig,
    LoadConfig,
    LrPhase,
    OptimConfig,
    RunConfig,
    ScoreConfig,
    ServeConfig,
    TrainConfig,
)
from megatron_m1.model.config import ModelConfig
from megatron_m1.pipeline_stages import stages
from megatron_m1.training.faults.plan import fault_problems
from parallel.layout import Layout

SHAPES = ("constant", "linear", "cosine", "exponential")
PRECISIONS = ("fp32", "bf16")
RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_MODULES = ("core_attn", "moe")
WANDB_MODES = ("auto", "offline", "online", "disabled")
CORPORA = ("stdlib", "indexed")
VERIFY = ("full", "sizes")
ON_ERROR = ("stop", "continue")
RERUN = ("disabled", "validate_results")

_AT_LEAST_ONE = (
    *("train.global_batch", "train.micro_batch", "train.seq_length", "data.corpus_bytes"),
    *("train.spike.window", "train.spike.steps"),
)
_NOT_NEGATIVE = (
    "seed",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.clip_grad",
    "optim.warmup_steps",
    "train.eval_every",
    "train.sample_tokens",
    "train.max_skipped",
    "train.watchdog_seconds",
    "train.straggler_every",
    "train.spike.deviations",
    "train.spike.rollbacks",
    "checkpoint.every",
    "logger.moe_load_every",
)


def run_problems(config: RunConfig, world_size: int) -> list[str]:
    """Every reason why this run cannot start on ``world_size`` processes, one sentence each."""
    layout = config.parallel
    unfit = layout.problems(world_size)
    found = [*config.model.problems(), *unfit, *model_layout_problems(config.model, layout)]
    if config.world_size not in (None, world_size):
        found.append(f"world_size={config.world_size} does not equal the {world_size} started")
    found += _length_problems(config.train)
    if not unfit:
        found += _batch_problems(config.train, layout, layout.data_parallel(world_size))
    found += [*_optim_problems(config.optim), *_bounds(config), *_choices(config)]
    found += _exchange_problems(layout, config.train)
    if config.train.straggler_factor <= 1:
        found.append(f"train.straggler_factor={config.train.straggler_factor} must be above 1")
    found += fault_problems(config.fault, world_size, config.train.watchdog_seconds)
    if config.train.precision == "bf16" and not config.optim.distributed:
        found.append(
            "optim.distributed=false needs train.precision=fp32: Megatron-core cannot save the "
            "state of its other optimizer over weights of two precisions"
        )
    return found


def generate_problems(config: GenerateConfig) -> list[str]:
    """What is wrong with a request for text, before its checkpoint is read."""
    found = _inference_problems(config.parallel, config.checkpoint, config.precision)
    if config.max_new_tokens < 1:
        found.append(f"max_new_tokens={config.max_new_tokens} must be at least 1")
    if config.temperature < 0:
        found.append(f"temperature={config.temperature} must be 0 (greedy) or more")
    if not 0 < config.top_p <= 1:
        found.append(f"top_p={config.top_p} must be in (0, 1]")
    return found


def score_problems(config: ScoreConfig) -> list[str]:
    """What is wrong with a request for scores, before its checkpoint is read."""
    found = _inference_problems(config.parallel, config.checkpoint, config.precision)
    if not config.tokens.endswith((".npy", ".jsonl")):
        found.append(f"tokens={config.tokens or 'null'}: give tokens=FILE.npy or tokens=FILE.jsonl")
    if not config.out.endswith(".npy"):
        found.append(f"out={config.out or 'null'}: give out=FILE.npy")
    if config.micro_batch < 1:
        found.append(f"micro_batch={config.micro_batch} must be at least 1")
    return found


def serve_problems(config: ServeConfig) -> list[str]:
    """What is wrong with a server, before its checkpoint is read."""
    found = _inference_problems(config.parallel, config.checkpoint, config.precision)
    for name in ("slots", "prefill_tokens", "max_length"):
        value = getattr(config.server, name)
        if value < 1:
            found.append(f"server.{name}={value} must be at least 1")
    if not 0 <= config.server.port < 65536:
        found.append(f"server.port={config.server.port} must be in 0..65535")
    return found


def _inference_problems(layout: Layout, checkpoint: LoadConfig, precision: str) -> list[str]:
    found = not_among("precision", precision, PRECISIONS)
    found += not_among("checkpoint.verify", checkpoint.verify, VERIFY)
    if not checkpoint.load:
        found.append("checkpoint.load is missing: give checkpoint.load=FOLDER of a run")
    if layout.vpp:
        found.append(f"parallel.vpp={layout.vpp}: virtual stages serve training only, use null")
    if layout.cp > 1:
        found.append(f"parallel.cp={layout.cp}: context parallelism serves training only, use 1")
    return found


def model_layout_problems(model: ModelConfig, layout: Layout) -> list[str]:
    """Where the model's sizes and the layout's degrees do not fit each other."""
    found = []
    for size, degree in (
        ("num_attention_heads", "tp"),
        ("num_query_groups", "tp"),
        ("vocab_size", "tp"),
        ("num_experts", "ep"),
        ("ffn_hidden_size", "etp"),
    ):
        amount, parts = getattr(model, size), getattr(layout, degree)
        if parts >= 1 and amount % parts:
            found.append(f"model.{size}={amount} is not divisible by parallel.{degree}={parts}")
    pieces = layout.pp * (layout.vpp or 1)
    if layout.pipeline_layout is not None:
        found += _pipeline_layout_problems(layout, model.num_layers, pieces)
    elif pieces >= 1 and model.num_layers % pieces:
        found.append(
            f"model.num_layers={model.num_layers} cannot be cut evenly over pp*vpp={pieces} "
            "stages: give parallel.pipeline_layout, for example 'Ettt|tttttL'"
        )
    return found


def _exchange_problems(layout: Layout, train: TrainConfig) -> list[str]:
    """What the ways of carrying tokens to their experts ask of the run."""
    found = []
    precision = f"train.precision=bf16, not {train.precision}"
    if layout.moe_dispatcher == "deepep" and train.precision != "bf16":
        found.append(f"parallel.moe_dispatcher=deepep needs {precision}")
    if layout.overlap_moe_expert_parallel_comm:
        overlap = "parallel.overlap_moe_expert_parallel_comm=true needs"
        if train.precision != "bf16":
            found.append(f"{overlap} {precision}")
        if train.recompute == "full" or (
            train.recompute == "selective" and "moe" in train.recompute_modules
        ):
            found.append(
                f"{overlap} train.recompute=none, or selective without moe, not {train.recompute}"
            )
    return found


def _pipeline_layout_problems(layout: Layout, num_layers: int, pieces: int) -> list[str]:
    parts = stages(layout, num_layers)
    letters = "".join(parts)
    named = f"parallel.pipeline_layout={layout.pipeline_layout}"
    if letters != f"E{'t' * (len(letters) - 2)}L":
        return [f"{named} must be E (embedding), a t for each layer and L (head), cut by |"]
    found = []
    if len(parts) != pieces:
        found.append(f"{named} has {len(parts)} stages, but pp*vpp={pieces}")
    elif not all("t" in "".join(parts[rank :: layout.pp]) for rank in range(layout.pp)):
        found.append(f"{named} leaves a pipeline rank without a layer (t)")
    if letters.count("t") != num_layers:
        found.append(
            f"{named} has {letters.count('t')} layers (t), but model.num_layers={num_layers}"
        )
    return found


def _bounds(config: RunConfig) -> list[str]:
    found = [f"{key}={value} must be at least 1" for key, value in _below(config, _AT_LEAST_ONE, 1)]
    found += [f"{key}={value} must not be negative" for key, value in _below(config, _NOT_NEGATIVE)]
    for key in ("keep", "keep_every"):
        value = getattr(config.checkpoint, key)
        if value is not None and value < 1:
            found.append(f"checkpoint.{key}={value} must be at least 1, or null to keep all")
    return found


def _below(config: RunConfig, keys: tuple[str, ...], least: int = 0) -> Iterator[tuple[str, Any]]:
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value < least:
            yield key, value


def _choices(config: RunConfig) -> list[str]:
    train = config.train
    found = [
        *not_among("train.precision", train.precision, PRECISIONS),
        *not_among("train.recompute", train.recompute, RECOMPUTE),
        *not_among("train.rerun", train.rerun, RERUN),
        *not_among("logger.wandb", config.logger.wandb, WANDB_MODES),
        *not_among("data.corpus", config.data.corpus, CORPORA),
        *not_among("checkpoint.verify", config.checkpoint.verify, VERIFY),
        *not_among("checkpoint.on_error", config.checkpoint.on_error, ON_ERROR),
    ]
    for module in train.recompute_modules:
        found += not_among("train.recompute_modules", module, RECOMPUTE_MODULES)
    return found


def not_among(key: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{key}={value} is not one of {', '.join(choices)}"]


def _length_problems(train: TrainConfig) -> list[str]:
    if (train.steps is None) == (train.tokens is None):
        return [f"train.steps={train.steps} and train.tokens={train.tokens}: set exactly one"]
    name = "tokens" if train.steps is None else "steps"
    amount = getattr(train, name)
    return [] if amount >= 1 else [f"train.{name}={amount} must be at least 1"]


def _batch_problems(train: TrainConfig, layout: Layout, data_parallel: int) -> list[str]:
    row = train.micro_batch * train.seq_length
    if row < 1:
        return []
    factors = {"train.micro_batch": train.micro_batch, "data parallel": data_parallel}
    if layout.vpp:
        # The interleaved schedule takes micro-batches in groups of pp.
        factors["parallel.pp"] = layout.pp
    multiple = math.prod(factors.values())
    product = " * ".join(f"{name} {factor}" for name, factor in factors.items())
    found = [
        f"{key}={rows} must be a multiple of {multiple} ({product})"
        for key, rows in _batches(train)
        if rows < 1 or rows % multiple
    ]
    if layout.cp == 1 and row % layout.tp:
        found.append(
            f"train.micro_batch * train.seq_length = {row} is not divisible by "
            f"parallel.tp={layout.tp}, which divides the tokens among the routers"
        )
    if layout.cp > 1 and row < layout.row_multiple:
        found.append(
            f"train.micro_batch * train.seq_length = {row} tokens are too few to cut: "
            f"parallel.cp={layout.cp} with cp_cut={layout.cp_cut} and tp={layout.tp} needs rows of "
            f"at least {layout.row_multiple}"
        )
    return found


def _batches(train: TrainConfig) -> Iterator[tuple[str, int]]:
    """Every number of rows that is dealt to the data-parallel processes."""
    yield "train.global_batch", train.global_batch
    for index, phase in enumerate(train.batch_phases):
        yield f"train.batch_phases[{index}].global_batch", phase.global_batch
    if train.eval_every > 0:
        yield "train.eval_rows", train.eval_rows


def _optim_problems(optim: OptimConfig) -> list[str]:
    found = [
        f"optim.{name}={getattr(optim, name)} must be positive"
        for name in ("lr", "eps")
        if getattr(optim, name) <= 0
    ]
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        found.append(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    # The stretch that an empty list of phases stands for has no length of its own.
    whole = LrPhase(tokens=1, lr=optim.lr, end_lr=optim.min_lr, shape=optim.shape)
    found += [] if optim.phases else _lr_phase_problems("optim", "min_lr", whole)
    for index, phase in enumerate(optim.phases):
        found += _lr_phase_problems(f"optim.phases[{index}]", "end_lr", phase)
    if optim.overlap_param_gather and not (optim.distributed and optim.overlap_grad_reduce):
        found.append(
            "optim.overlap_param_gather=true needs optim.distributed=true and "
            "optim.overlap_grad_reduce=true"
        )
    return found


def _lr_phase_problems(where: str, end: str, phase: LrPhase) -> list[str]:
    found = not_among(f"{where}.shape", phase.shape, SHAPES)
    if phase.tokens < 1:
        found.append(f"{where}.tokens={phase.tokens} must be at least 1")
    if where != "optim" and phase.lr <= 0:
        found.append(f"{where}.lr={phase.lr} must be positive")
    if phase.shape == "constant" and phase.end_lr not in (None, phase.lr) and where != "optim":
        found.append(
            f"{where}.end_lr={phase.end_lr} is not reached with shape=constant: give shape=linear, "
            "cosine or exponential"
        )
    if phase.shape == "exponential" and phase.end_lr is not None and phase.end_lr <= 0:
        found.append(f"{where}.{end}={phase.end_lr} must be positive where shape=exponential")
    return found


def data_problems(config: RunConfig) -> list[str]:
    """What is missing of the data's description; a dry run needs none of it."""
    data, found = config.data, []
    if data.corpus == "indexed" and not data.train:
        found.append("data.train is empty: give data.train=[PREFIX], the path of a .bin/.idx pair")
    if data.weights and len(data.weights) != len(data.train):
        found.append(
            f"data.weights={data.weights} must hold one number for each of the {len(data.train)} "
            "datasets in data.train"
        )
    if config.train.eval_every and data.corpus == "indexed" and not data.valid:
        found.append(
            f"train.eval_every={config.train.eval_every} needs held-out text: give "
            "data.valid=[PREFIX], or train.eval_every=0"
        )
    if config.train.sample_prompt and data.corpus == "indexed" and not data.tokenizer:
        found.append("train.sample_prompt needs data.tokenizer=FILE")
    return found
