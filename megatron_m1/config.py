"""The schema of a run: every key that a user can set, with its type and default.

Values come from ``conf/`` and the command line (see ``config_loading``). Below the entry points the
program sees these dataclasses only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_m1.model.config import ModelConfig
from parallel.layout import Layout


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
class ComputeConfig:
    """How a training step computes.

    Attributes:
        recompute: activations to compute again in the backward pass: none, selective, full.
        recompute_modules: what ``selective`` means: core_attn (of softmax layers) and/or moe.
        report: draw the run's report when training ends.
    """

    precision: str = "bf16"
    recompute: str = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    report: bool = True


@dataclass
class SpikeConfig:
    """When a loss counts as a spike, and how often a run goes back for it.

    Attributes:
        deviations: a spike is above median + deviations x MAD of the losses before; 0 looks for
            none, 10 is a start.
        window: of how many losses these are.
        steps: as many in a row are a spike.
        rollbacks: how often at most.
    """

    deviations: float = 0.0
    window: int = 100
    steps: int = 3
    rollbacks: int = 3


@dataclass
class TrainConfig(ComputeConfig):
    """The length and shape of the run. Batches count rows of ``seq_length`` tokens.

    Attributes:
        steps: stop after this many optimizer steps, or
        tokens: after this many tokens; exactly one of the two is set.
        eval_every: steps between evaluations on held-out rows; 0 never.
        eval_rows: rows of an evaluation.
        sample_prompt: text to continue when training ends; null for none.
        max_skipped: steps in a row that may be skipped because their loss or gradient is not
            finite; the next one ends the run.
        rerun: what Megatron's rerun state machine does: disabled, or validate_results, which tries
            a step whose loss is not finite a second time.
        watchdog_seconds: end the run when a process shows no progress for so long; 0 never. Below
            the ten minutes after which a collective fails by itself.
        straggler_every: steps between comparisons of the processes' speeds; 0 never.
        straggler_factor: name the slowest process when it takes so many times the median.
    """

    steps: int | None = None
    tokens: int | None = None
    global_batch: int = 8
    micro_batch: int = 1
    seq_length: int = 512
    batch_phases: list[BatchPhase] = field(default_factory=list)
    eval_every: int = 0
    eval_rows: int = 32
    sample_prompt: str | None = None
    sample_tokens: int = 64
    max_skipped: int = 3
    rerun: str = "disabled"
    watchdog_seconds: float = 540.0
    straggler_every: int = 50
    straggler_factor: float = 1.5
    spike: SpikeConfig = field(default_factory=SpikeConfig)


@dataclass
class CheckpointConfig:
    """Where training state is kept.

    Attributes:
        dir: folder of the checkpoints; null is ``RUN_DIR/checkpoints``.
        load: start from this checkpoint, or from the latest in a folder of checkpoints or of a
            run. Where ``dir`` holds a checkpoint the run goes on from that, as a restarted job
            must; only a step folder within ``dir`` goes before its latest.
        verify: what is compared with the manifest before a checkpoint is loaded: full (sizes and
            hashes) or sizes.
        every: steps between checkpoints; 0 saves at the end only.
        save_at_end: save when training ends.
        async_save: train on while the state, copied to the host, is written.
        on_error: when a checkpoint cannot be written: stop, or continue. The last one always stops.
        keep: how many of the newest checkpoints stay; null keeps all.
        keep_every: checkpoints of steps that this divides stay too.
    """

    dir: str | None = None
    load: str | None = None
    verify: str = "full"
    every: int = 0
    save_at_end: bool = True
    async_save: bool = True
    on_error: str = "stop"
    keep: int | None = None
    keep_every: int | None = None


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
class CommonConfig:
    """What every run that trains a model is made of.

    Attributes:
        run_dir: folder of the metrics, the configuration, the report and the checkpoints.
        world_size: how many processes the run is meant for; another number is refused. null takes
            those that were started, and in a dry run the fewest that the layout divides.
        dry_run: print configuration, layout, sizes and memory, and end.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: Layout = field(default_factory=Layout)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run_dir: str = "runs/default"
    seed: int = 1234
    world_size: int | None = None
    dry_run: bool = False

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.checkpoint.dir or Path(self.run_dir) / "checkpoints")


@dataclass
class RunConfig(CommonConfig):
    """A pretraining run.

    Attributes:
        fault: faults to make on purpose, as KIND@STEP:RANK; each once.
    """

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fault: list[str] = field(default_factory=list)


@dataclass
class LoadConfig:
    """The checkpoint to read.

    Attributes:
        load: a step's folder, a folder of checkpoints, or a run's folder.
        verify: what is compared with the manifest before: full (sizes and hashes) or sizes.
    """

    load: str | None = None
    verify: str = "full"


@dataclass
class GenerateConfig:
    """Text from a checkpoint; the model's sizes come from the checkpoint.

    Attributes:
        tokenizer: a ``tokenizer.json`` or its folder; null is the checkpoint's.
        temperature: 0 takes the most likely token.
        top_p: sample from the fewest tokens whose probabilities reach this sum.
    """

    checkpoint: LoadConfig = field(default_factory=LoadConfig)
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

    checkpoint: LoadConfig = field(default_factory=LoadConfig)
    parallel: Layout = field(default_factory=Layout)
    tokens: str = ""
    out: str = ""
    micro_batch: int = 1
    precision: str = "fp32"


@dataclass
class ServerConfig:
    """Where and how a server answers.

    Attributes:
        host: the address to listen at; loopback is for this machine alone.
        port: 0 takes one that is free.
        name: of the model until other weights are loaded; null is the checkpoint's path.
        slots: responses that are generated at a time on each data-parallel process.
        prefill_tokens: tokens of prompts that a process reads between two tokens of responses.
        max_length: tokens of a prompt with its response; slots have room for so many.
        key_variable: the environment variable with the key that callers must show; null asks none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    slots: int = 16
    prefill_tokens: int = 2048
    max_length: int = 4096
    key_variable: str | None = None


@dataclass
class ServeConfig:
    """A model that answers over HTTP; its sizes come from the checkpoint.

    Attributes:
        tokenizer: a ``tokenizer.json`` or its folder; null is the checkpoint's, and later that of
            weights which bring one.
    """

    checkpoint: LoadConfig = field(default_factory=LoadConfig)
    parallel: Layout = field(default_factory=Layout)
    server: ServerConfig = field(default_factory=ServerConfig)
    tokenizer: str | None = None
    eod: str = "<|endoftext|>"
    precision: str = "fp32"
