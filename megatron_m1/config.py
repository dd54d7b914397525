"""The schema of a run: every key that a user can set, with its type and default.

Values come from ``conf/`` and the command line (see ``config_loading``). Below the entry points the
program sees these dataclasses only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_m1.model.config import ModelConfig
from parallel.layout import Layout

SHAPES = ("constant", "linear", "cosine", "exponential")
PRECISIONS = ("fp32", "bf16")
RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_MODULES = ("core_attn", "moe")
WANDB_MODES = ("auto", "offline", "online", "disabled")
CORPORA = ("stdlib", "indexed")


@dataclass
class DataConfig:
    """Where the tokens come from.

    Attributes:
        corpus: ``stdlib`` prepares the Python standard library's sources and docs in ``folder``;
            ``indexed`` reads Megatron ``.bin/.idx`` pairs.
        train: prefixes of the indexed datasets (``corpus=indexed``).
        weights: one weight a prefix, in any scale; empty means equal.
        valid: prefixes of held-out datasets; empty means no evaluation.
        tokenizer: a ``tokenizer.json`` or its folder.
        eod: the text of the end-of-document token.
        pack_documents: whole documents in a row, nothing crossing between them; false concatenates.
        corpus_bytes: how much of the standard library is read (``corpus=stdlib``).
    """

    corpus: str = "stdlib"
    folder: str = "data/stdlib"
    train: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    eod: str = "<|endoftext|>"
    pack_documents: bool = True
    corpus_bytes: int = 10_000_000


@dataclass
class LrPhase:
    """A stretch of ``tokens`` tokens in which the learning rate goes from ``lr`` to ``end_lr``."""

    tokens: int = 0
    lr: float = 0.0
    end_lr: float | None = None
    shape: str = "constant"


@dataclass
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        warmup_steps: linear rise from 0; it multiplies whatever the phases say.
        shape: how the rate goes from ``lr`` to ``min_lr`` over the run where ``phases`` is empty.
        phases: stretches one after another, by tokens; the last one's end rate stays.
        distributed: shard the optimizer state over data-parallel processes (ZeRO-1).
    """

    lr: float = 2e-4
    min_lr: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    warmup_steps: int = 0
    shape: str = "cosine"
    phases: list[LrPhase] = field(default_factory=list)
    distributed: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class BatchPhase:
    """From ``from_tokens`` trained tokens on, a step takes ``global_batch`` rows."""

    from_tokens: int = 0
    global_batch: int = 0


@dataclass
class TrainConfig:
    """The length and shape of the run. Batches count rows of ``seq_length`` tokens.

    Attributes:
        steps: stop after this many optimizer steps, or
        tokens: after this many tokens; exactly one of the two is set.
        eval_every: steps between evaluations on held-out rows; 0 never.
        eval_rows: rows of an evaluation.
        recompute: activations to compute again in the backward pass: none, selective, full.
        recompute_modules: what ``selective`` means: core_attn and/or moe.
        sample_prompt: text to continue when training ends; null for none.
        report: draw the run's report when training ends.
    """

    steps: int | None = None
    tokens: int | None = None
    global_batch: int = 8
    micro_batch: int = 1
    seq_length: int = 512
    precision: str = "bf16"
    batch_phases: list[BatchPhase] = field(default_factory=list)
    eval_every: int = 0
    eval_rows: int = 32
    recompute: str = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    sample_prompt: str | None = None
    sample_tokens: int = 64
    report: bool = True


@dataclass
class CheckpointConfig:
    """Where training state is kept.

    Attributes:
        dir: folder of the checkpoints; null is ``RUN_DIR/checkpoints``.
        load: a checkpoint, or a folder of checkpoints whose latest is taken; null resumes from
            ``dir`` where it holds one.
        every: steps between checkpoints; 0 saves at the end only.
        save_at_end: save when training ends.
    """

    dir: str | None = None
    load: str | None = None
    every: int = 0
    save_at_end: bool = True


@dataclass
class LoggerConfig:
    """Optional sinks beside RUN_DIR/metrics.jsonl, which is always written.

    Attributes:
        wandb: auto (online where a key is configured, else offline), offline, online, disabled.
        moe_load_every: steps between records of the layer-by-expert load.
    """

    console: bool = True
    wandb: str = "auto"
    wandb_project: str = "megatron-m1"
    wandb_entity: str | None = None
    wandb_name: str | None = None
    tensorboard: bool = False
    moe_load_every: int = 1


@dataclass
class RunConfig:
    """Everything that a pretraining run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: Layout = field(default_factory=Layout)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run_dir: str = "runs/default"
    seed: int = 1234
    dry_run: bool = False


@dataclass
class GenerateConfig:
    """Text from a checkpoint; the model's sizes come from the checkpoint."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: Layout = field(default_factory=Layout)
    tokenizer: str | None = None
    eod: str = "<|endoftext|>"
    prompt: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    precision: str = "fp32"
    seed: int = 1234


@dataclass
class ScoreConfig:
    """Log-probabilities of given tokens; the model's sizes come from the checkpoint.

    Attributes:
        tokens: ``.npy`` of [B, T] ids, or ``.jsonl`` with one list of ids (or {"tokens": [...]}) a
            line.
        out: ``.npy`` of [B, T-1] float32; shorter jsonl rows are filled with NaN.
        micro_batch: rows in one forward pass.
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: Layout = field(default_factory=Layout)
    tokens: str = ""
    out: str = ""
    micro_batch: int = 1
    precision: str = "fp32"


def model_layout_problems(model: ModelConfig, layout: Layout) -> list[str]:
    """Where the model's sizes and the layout's degrees do not divide."""
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
    stages = layout.pp * (layout.vpp or 1)
    if layout.pipeline_layout is None and stages > 1 and model.num_layers % stages:
        found.append(
            f"model.num_layers={model.num_layers} cannot be cut evenly over pp*vpp={stages} stages: "
            "give parallel.pipeline_layout, for example Ettt|tttttL"
        )
    if layout.pipeline_layout is not None:
        found += _pipeline_layout_problems(layout, model.num_layers)
    return found


def _pipeline_layout_problems(layout: Layout, num_layers: int) -> list[str]:
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    text, stages = str(layout.pipeline_layout), layout.pp * (layout.vpp or 1)
    try:
        parts = PipelineParallelLayerLayout.parse_str_to_list(text)
    except (AssertionError, ValueError) as error:
        return [f"parallel.pipeline_layout={text!r} cannot be read: {error}"]
    found = []
    if len(parts) != stages:
        found.append(
            f"parallel.pipeline_layout={text!r} has {len(parts)} stages, but pp*vpp={stages}"
        )
    layers = sum(part.count("decoder") for part in parts)
    if layers != num_layers:
        found.append(
            f"parallel.pipeline_layout={text!r} has {layers} layers (t), but "
            f"model.num_layers={num_layers}"
        )
    return found


def run_problems(config: RunConfig, world_size: int) -> list[str]:
    """Every reason why this run cannot start on ``world_size`` processes, one sentence each."""
    found = config.model.problems() + config.parallel.problems(world_size)
    if found:
        return found
    found += model_layout_problems(config.model, config.parallel)
    found += _train_problems(config, config.parallel.data_parallel(world_size))
    found += _optim_problems(config.optim)
    found += _choice_problems(config)
    return found


def _train_problems(config: RunConfig, data_parallel: int) -> list[str]:
    train, layout = config.train, config.parallel
    found = []
    if (train.steps is None) == (train.tokens is None):
        found.append(
            f"train.steps={train.steps} and train.tokens={train.tokens}: set exactly one of them"
        )
    for name in ("global_batch", "micro_batch", "seq_length"):
        if getattr(train, name) < 1:
            found.append(f"train.{name}={getattr(train, name)} must be at least 1")
    if found:
        return found
    per_round = train.micro_batch * data_parallel
    for batch in [train.global_batch, *(phase.global_batch for phase in train.batch_phases)]:
        if batch < 1 or batch % per_round:
            found.append(
                f"train.global_batch={batch} is not a multiple of train.micro_batch * data parallel "
                f"= {train.micro_batch} * {data_parallel}"
            )
        elif layout.vpp and (batch // per_round) % layout.pp:
            found.append(
                f"train.global_batch={batch} gives {batch // per_round} micro-batches, but the "
                f"interleaved schedule needs a multiple of parallel.pp={layout.pp}"
            )
    if train.eval_every and train.eval_rows % per_round:
        found.append(
            f"train.eval_rows={train.eval_rows} is not a multiple of train.micro_batch * data "
            f"parallel = {per_round}"
        )
    row = train.micro_batch * train.seq_length
    if row % layout.tp:
        found.append(
            f"train.micro_batch * train.seq_length = {row} is not divisible by "
            f"parallel.tp={layout.tp}"
        )
    return found


def _optim_problems(optim: OptimConfig) -> list[str]:
    found = []
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        found.append(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    for name in ("lr", "eps"):
        if getattr(optim, name) <= 0:
            found.append(f"optim.{name}={getattr(optim, name)} must be positive")
    for shape in [optim.shape, *(phase.shape for phase in optim.phases)]:
        if shape not in SHAPES:
            found.append(f"optim shape {shape!r} is not one of {', '.join(SHAPES)}")
    return found


def _choice_problems(config: RunConfig) -> list[str]:
    train, data = config.train, config.data
    found = [
        f"{key}={value} is not one of {', '.join(choices)}"
        for key, value, choices in (
            ("train.precision", train.precision, PRECISIONS),
            ("train.recompute", train.recompute, RECOMPUTE),
            ("logger.wandb", config.logger.wandb, WANDB_MODES),
            ("data.corpus", data.corpus, CORPORA),
        )
        if value not in choices
    ]
    unknown = set(train.recompute_modules) - set(RECOMPUTE_MODULES)
    if unknown:
        found.append(
            f"train.recompute_modules={sorted(unknown)} may hold only "
            f"{', '.join(RECOMPUTE_MODULES)}"
        )
    if data.corpus == "indexed" and not data.train:
        found.append("data.train is empty: give the prefix of at least one .bin/.idx pair")
    if data.weights and len(data.weights) != len(data.train):
        found.append(
            f"data.weights has {len(data.weights)} numbers for {len(data.train)} datasets in "
            "data.train"
        )
    return found
