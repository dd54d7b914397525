"""What keeps a configuration of RL from running: every problem, as a sentence."""

from __future__ import annotations

import math

from megatron_m1.config import CommonConfig, RunConfig, TrainConfig
from megatron_m1.config_checks import not_among, run_problems
from megatron_m1.rl.config import LatePhase, PolicyConfig, RLConfig, RolloutConfig
from megatron_m1.rl.rewards.config import reward_problems

OBJECTIVES = ("cispo", "ppo")
AGGREGATIONS = ("prompt_mean", "token_mean", "sequence_mean")  # aggregation.py imports torch
OLD_LOGPROBS = ("trainer", "rollout")
ENGINES = ("native", "http")

_AT_LEAST_ONE = (
    *("rl.prompts_per_batch", "rl.updates_per_batch", "rl.refills"),
    *("rollout.slots", "rollout.prefill_tokens", "rollout.max_new_tokens"),
    *("train.steps", "train.row_tokens"),
)


def as_pretraining(config: RLConfig, world_size: int) -> RunConfig:
    """A pretraining run whose steps are the size of an update's, for checks and estimates."""
    layout, train = config.parallel, config.train
    data_parallel = max(layout.data_parallel(world_size), 1)
    shared = {name: getattr(config, name) for name in CommonConfig.__dataclass_fields__}
    row = math.ceil(max(train.row_tokens, 1) / layout.row_multiple) * layout.row_multiple
    return RunConfig(
        **shared,
        train=TrainConfig(
            steps=max(train.steps, 1) * max(config.rl.updates_per_batch, 1),
            global_batch=data_parallel * (layout.pp if layout.vpp else 1),
            seq_length=row,
            precision=train.precision,
            recompute=train.recompute,
            recompute_modules=train.recompute_modules,
        ),
    )


def rl_problems(config: RLConfig, world_size: int) -> list[str]:
    """Every reason why this run cannot start on ``world_size`` processes, one sentence each."""
    layout = config.parallel
    if layout.problems(world_size):
        return layout.problems(world_size)
    found = run_problems(as_pretraining(config, world_size), world_size)
    for key in _AT_LEAST_ONE:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            found.append(f"{key}={value} must be at least 1")
    found += [*_policy_problems(config.rl), *_rollout_problems(config.rollout)]
    found += [*_staleness_problems(config), *_model_problems(config)]
    if config.rollout.engine == "http":
        found += _http_problems(config)
    found += [*config.rl.windows.problems(), *_overlong_problems(config)]
    found += reward_problems(config.reward)
    if config.optim.phases:
        found.append("optim.phases counts trained tokens and is for pretraining: use optim.shape")
    return found


def data_problems(config: RLConfig) -> list[str]:
    """What is missing of the prompts' description; a dry run needs none of it."""
    data, found = config.data, []
    if bool(data.tasks) == bool(data.files):
        found.append(
            f"data.tasks={[task.name for task in data.tasks]} and data.files={data.files}: give "
            "one of them"
        )
    if config.teach.steps and not data.tasks:
        found.append("teach.steps needs data.tasks, whose generators know the answers")
    return found


def _policy_problems(rl: PolicyConfig) -> list[str]:
    found = [
        *not_among("rl.objective", rl.objective, OBJECTIVES),
        *not_among("rl.aggregation", rl.aggregation, AGGREGATIONS),
        *not_among("rl.old_logprobs", rl.old_logprobs, OLD_LOGPROBS),
    ]
    for name, least, most in (
        ("is_weight", rl.is_weight_min, rl.is_weight_max),
        ("ratio", rl.ratio_min, rl.ratio_max),
        ("mask", rl.mask_min, math.inf if rl.mask_max is None else rl.mask_max),
    ):
        if not 0 <= least <= 1 <= most:
            found.append(
                f"rl.{name}_min={least} and rl.{name}_max={most} must be absolute bounds around 1, "
                "the weight of on-policy tokens: 5.0 rather than 4.0 above it"
            )
    if rl.group_size < 2:
        found.append(f"rl.group_size={rl.group_size} must be at least 2: an advantage compares")
    if rl.updates_per_batch > rl.prompts_per_batch > 0:
        found.append(
            f"rl.updates_per_batch={rl.updates_per_batch} must not be more than "
            f"rl.prompts_per_batch={rl.prompts_per_batch}, which the updates share"
        )
    if not 0 <= rl.sequence_share <= 1:
        found.append(f"rl.sequence_share={rl.sequence_share} must be in [0, 1]")
    for name in ("overlong_buffer", "overlong_penalty"):
        if getattr(rl, name) < 0:
            found.append(f"rl.{name}={getattr(rl, name)} must not be negative")
    for index, phase in enumerate(rl.late):
        found += _late_problems(f"rl.late[{index}]", phase)
    return found


def _overlong_problems(config: RLConfig) -> list[str]:
    shortest = min(config.rl.windows.stages or [config.rollout.max_new_tokens])
    if config.rl.overlong_buffer <= shortest:
        return []
    return [
        f"rl.overlong_buffer={config.rl.overlong_buffer} must not be more than {shortest}, the "
        "tokens of the shortest output window"
    ]


def _late_problems(where: str, phase: LatePhase) -> list[str]:
    found, weight = [], phase.is_weight_max
    if weight is not None and weight < 1:
        found.append(
            f"{where}.is_weight_max={weight} must be at least 1, the weight of on-policy tokens"
        )
    if phase.clip_grad is not None and phase.clip_grad <= 0:
        found.append(f"{where}.clip_grad={phase.clip_grad} must be positive")
    return found


def _staleness_problems(config: RLConfig) -> list[str]:
    staleness, found = config.rl.max_staleness, []
    if staleness < 0:
        return [f"rl.max_staleness={staleness} must not be negative"]
    if staleness == 0:
        return []
    if config.rollout.engine == "native":
        found.append(
            f"rl.max_staleness={staleness} draws while the model is trained, which "
            "rollout.engine=native cannot, since it is that model: use rollout.engine=http, or 0"
        )
    if config.rl.old_logprobs != "rollout":
        found.append(
            f"rl.max_staleness={staleness} needs rl.old_logprobs=rollout: importance weights "
            "correct for the policy that drew, and the trainer's is newer"
        )
    if config.rollout.tokens_per_step is not None:
        found.append(
            f"rollout.tokens_per_step={config.rollout.tokens_per_step} lets a response grow over "
            f"more steps than rl.max_staleness={staleness} may allow: use null"
        )
    return found


def _rollout_problems(rollout: RolloutConfig) -> list[str]:
    found = not_among("rollout.engine", rollout.engine, ENGINES)
    if rollout.temperature <= 0:
        found.append(f"rollout.temperature={rollout.temperature} must be above 0: a group differs")
    if not 0 < rollout.top_p <= 1:
        found.append(f"rollout.top_p={rollout.top_p} must be in (0, 1]")
    for name in ("top_k", "repetition_length"):
        if getattr(rollout, name) < 0:
            found.append(f"rollout.{name}={getattr(rollout, name)} must not be negative")
    if not 0 < rollout.repetition_probability < 1:
        found.append(
            f"rollout.repetition_probability={rollout.repetition_probability} must be between 0 "
            "and 1"
        )
    if "" in rollout.stop:
        found.append(f"rollout.stop={rollout.stop} holds an empty text, which ends nothing")
    if rollout.tokens_per_step is not None and rollout.tokens_per_step < 1:
        found.append(
            f"rollout.tokens_per_step={rollout.tokens_per_step} must be at least 1, or null"
        )
    return found


def _http_problems(config: RLConfig) -> list[str]:
    rollout, found = config.rollout, config.rollout.http.problems()
    if config.rl.routing_replay:
        found.append(
            "rl.routing_replay=true needs rollout.engine=native: servers do not tell the experts"
        )
    if rollout.http.server == "vllm" and config.rl.max_staleness:
        found.append(
            f"rl.max_staleness={config.rl.max_staleness} needs a server that says which weights "
            "drew, which rollout.http.server=vllm does not: use megatron_m1 or sglang, or 0"
        )
    if rollout.http.server == "transformers":
        silent = "rollout.http.server=transformers tells no log-probabilities, which"
        if rollout.repetition_length:
            found.append(
                f"{silent} rollout.repetition_length={rollout.repetition_length} looks at: use 0"
            )
        if len(config.rl.windows.stages) > 1:
            found.append(f"{silent} rl.windows.stages={config.rl.windows.stages} go by: use one")
        if config.rl.max_staleness:
            found.append(f"{silent} rl.max_staleness={config.rl.max_staleness} corrects by: use 0")
    return found


def _model_problems(config: RLConfig) -> list[str]:
    model, layout, found = config.model, config.parallel, []
    if (model.aux_loss_coef or model.z_loss_coef) and not config.rl.router_losses:
        found.append(
            f"model.aux_loss_coef={model.aux_loss_coef} and model.z_loss_coef="
            f"{model.z_loss_coef}: RL trains without the routers' losses, set both to 0, or ask "
            "for them with rl.router_losses=true"
        )
    if model.capacity_factor is not None:
        found.append(
            f"model.capacity_factor={model.capacity_factor} drops tokens in training that the "
            "rollout keeps: use null"
        )
    if layout.overlap_moe_expert_parallel_comm:
        found.append(
            "parallel.overlap_moe_expert_parallel_comm=true trains on the sum of losses only: use "
            "false"
        )
    return found
