"""The schema of a reinforcement-learning run; what it shares with pretraining is in
``megatron_m1/config.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_m1.config import CommonConfig, ComputeConfig
from megatron_m1.rl.rewards.config import RewardConfig
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.windows import WindowsConfig


@dataclass
class TaskConfig:
    """A generator of prompts and its share of them.

    Attributes:
        name: of the task.
        weight: share of the prompts, in any scale.
        difficulty: step of its knobs, from 0; null takes their defaults.
        knobs: single ones on top, as ``{digits: 3}``.
    """

    name: str = ""
    weight: float = 1.0
    difficulty: int | None = None
    knobs: dict[str, str] = field(default_factory=dict)


@dataclass
class PromptsConfig:
    """Where prompts come from.

    Attributes:
        tasks: generators that ship with the project; empty where ``files`` are given.
        files: parquet or JSON lines in verl's schema.
        tokenizer: a ``tokenizer.json`` or its folder, or ``bytes`` (256 and the end of documents);
            null is the checkpoint's.
        eod: the text of the token that ends a response.
    """

    tasks: list[TaskConfig] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    eod: str = "<|endoftext|>"


@dataclass
class TeachConfig:
    """Supervised steps on the tasks' reference answers before the first rollout, so that a model
    that starts from nothing is rewarded now and then. Kept in ``RUN_DIR/taught``.

    Attributes:
        steps: optimizer steps; 0 teaches nothing.
        examples: prompts with their answers that are made.
        wrong: share of them with the answer to another prompt: a model taught by a poor teacher
            knows more than it says, which RL brings out.
        batch: rows of ``seq_length`` tokens in a step, ``micro_batch`` of them at a time.
        aux_loss_coef: weight of the routers' balancing loss while teaching.
    """

    steps: int = 0
    examples: int = 20_000
    wrong: float = 0.0
    batch: int = 16
    seq_length: int = 512
    micro_batch: int = 4
    lr: float = 3e-3
    warmup_steps: int = 20
    aux_loss_coef: float = 1e-3


@dataclass
class LatePhase:
    """From a step and an output window on, other bounds hold; of several phases the last that is
    reached.

    Attributes:
        from_step, from_window: both must be reached.
        is_weight_max: null leaves ``rl.is_weight_max``.
        clip_grad: null leaves ``optim.clip_grad``.
    """

    from_step: int = 0
    from_window: int = 0
    is_weight_max: float | None = None
    clip_grad: float | None = None


@dataclass
class PolicyConfig:
    """What is learned from a batch of responses.

    Attributes:
        objective: cispo, or ppo, the clipped one of GRPO and DAPO.
        is_weight_max, is_weight_min: bounds of CISPO's importance weight, absolute.
        mask_max, mask_min: the token mask of the paper's equation 7, absolute: leaves tokens out
            that have gone beyond them in the direction of their advantage; null and 0 mask none.
        ratio_max, ratio_min: bounds of the ratio of ppo, absolute.
        aggregation: prompt_mean, token_mean or sequence_mean.
        sequence_share: the sample-level part of a combined loss: this share of the weights is
            sequence_mean's, the rest ``aggregation``'s.
        group_size: responses to a prompt.
        prompts_per_batch: prompts of a rollout batch.
        updates_per_batch: optimizer steps on a rollout batch, each on its own part of the prompts.
        dynamic_sampling: replace prompts whose responses all have the same reward.
        refills: how many times at most a batch is filled up.
        max_staleness: how many policy versions older than those that train on it a token may be;
            0 draws and trains in turn, more draws the next batches while one is trained on.
        overlong_buffer: tokens before the end of the window in which the reward falls; 0 for none.
        overlong_penalty: what the last of them costs.
        old_logprobs: trainer (computed again once per batch) or rollout (the engine's own).
        routing_replay: train each token with the experts that it had in the rollout.
        router_losses: train with the routers' auxiliary losses of ``model``.
        late: bounds that hold late in training.
        windows: output lengths in stages.
    """

    objective: str = "cispo"
    is_weight_max: float = 5.0
    is_weight_min: float = 0.0
    mask_max: float | None = None
    mask_min: float = 0.0
    ratio_max: float = 1.2
    ratio_min: float = 0.8
    aggregation: str = "prompt_mean"
    sequence_share: float = 0.0
    group_size: int = 8
    prompts_per_batch: int = 32
    updates_per_batch: int = 1
    dynamic_sampling: bool = True
    refills: int = 10
    max_staleness: int = 0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    old_logprobs: str = "trainer"
    routing_replay: bool = False
    router_losses: bool = False
    late: list[LatePhase] = field(default_factory=list)
    windows: WindowsConfig = field(default_factory=WindowsConfig)


@dataclass
class RolloutConfig:
    """How responses are drawn.

    Attributes:
        engine: native, the training model itself, or http, the servers of ``http``.
        slots: responses that are generated at a time on each data-parallel process; of native, as
            ``prefill_tokens``.
        prefill_tokens: tokens of prompts that a process reads between two tokens of responses.
        max_new_tokens: tokens of a response, where ``rl.windows.stages`` is empty.
        temperature: of the draws.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from this many of the most likely; 0 from all.
        stop: texts that end a response.
        repetition_length: end a response after this many tokens in a row whose probability is above
            ``repetition_probability``; 0 never.
        tokens_per_step: tokens that a response may draw in one step before it is paused, and goes
            on in the next step with the weights of then; null does not pause.
    """

    engine: str = "native"
    slots: int = 64
    prefill_tokens: int = 2048
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    repetition_length: int = 0
    repetition_probability: float = 0.99
    tokens_per_step: int | None = None
    http: HttpConfig = field(default_factory=HttpConfig)


@dataclass
class StepsConfig(ComputeConfig):
    """The length of the run and the shape of its micro-batches.

    Attributes:
        steps: rollout batches.
        row_tokens: tokens of a packed row, which is a micro-batch.
    """

    steps: int = 100
    row_tokens: int = 8192


@dataclass
class RLConfig(CommonConfig):
    """A reinforcement-learning run."""

    data: PromptsConfig = field(default_factory=PromptsConfig)
    rl: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    train: StepsConfig = field(default_factory=StepsConfig)
