"""The whole answer of the planner: what is printed, drawn and written as JSON is taken from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_m1.model.config import SOFTMAX, ModelConfig
from megatron_m1.planning import flops, price
from megatron_m1.planning.config import PlanConfig
from megatron_m1.planning.deepseek import DeepSeek
from megatron_m1.planning.layouts import Candidate, Search, search
from megatron_m1.planning.price import Price, RlCost
from megatron_m1.planning.rollout import Rollout, fullest
from megatron_m1.planning.state import kv_elements, lightning_state_bytes, state_bytes
from megatron_m1.training.phases import total_tokens

K = 1024
LENGTHS = (8 * K, 32 * K, 64 * K, 100 * K, 128 * K, 256 * K, 512 * K, 1024 * K)


@dataclass(frozen=True)
class Compared:
    """What a length costs in three models: ours, the same with softmax attention alone, and R1.

    Attributes:
        decode: operations of the token that makes the context this long.
        generation: of all its tokens one after the other.
        state: bytes that the sequence then keeps.
        absorbed: of R1's generation where attention is computed in the latent.
    """

    tokens: int
    decode: list[float]
    generation: list[float]
    state: list[float]
    absorbed: float


@dataclass(frozen=True)
class Answer:
    """What the planner found.

    Attributes:
        decoding: the smallest group of GPUs that holds the model, full of sequences as long as
            ``plan.rl`` says; None where the cluster cannot hold it.
    """

    config: PlanConfig
    search: Search
    tokens: int
    tokens_price: Price | None
    days_price: Price | None
    rl: RlCost | None
    decoding: Rollout | None

    @property
    def best(self) -> Candidate | None:
        return self.search.found[0] if self.search.found else None


def answer(config: PlanConfig) -> Answer:
    """Plan for a configuration.

    Raises:
        ConfigError: it describes no run, or none that the cluster could be divided for.
    """
    config = config.with_plan_applied()
    plan, found = config.plan, search(config)
    tokens = plan.tokens or total_tokens(config.train)
    best = found.found[0].cost if found.found else None
    return Answer(
        config=config,
        search=found,
        tokens=tokens,
        tokens_price=price.of_tokens(plan, best, tokens) if best else None,
        days_price=price.of_days(plan, plan.days) if plan.days else None,
        rl=price.of_rl(config, plan, best) if best and plan.rl.steps else None,
        decoding=fullest(config.model, plan, plan.rl.prompt_tokens, plan.rl.response_tokens),
    )


def twin(model: ModelConfig) -> ModelConfig:
    """The same sizes with softmax attention in every layer."""
    return replace(model, name=f"{model.name}, all softmax", layer_pattern=SOFTMAX)


def compared(model: ModelConfig, tokens: int) -> Compared:
    """The three models at one length."""
    r1, all_softmax = DeepSeek(), twin(model)
    three = (model, all_softmax, r1)
    return Compared(
        tokens=tokens,
        decode=[sum(flops.decode(each, tokens).values()) for each in three],
        generation=[flops.generation(each, tokens) for each in three],
        state=[
            state_bytes(model, tokens),
            state_bytes(all_softmax, tokens),
            r1.state_bytes(tokens),
        ],
        absorbed=flops.generation(replace(r1, absorbed=True), tokens),
    )


def as_json(found: Answer) -> dict[str, Any]:
    """Every number of the answer. Bytes, seconds, and operations without prefixes. The layouts that
    fit come first, the fastest before the others; the configured one is marked, fits or not."""
    model, train = found.config.model, found.config.train
    length = found.config.plan.document_length or train.seq_length
    return {
        "model": {
            "name": model.name,
            "parameters": model.num_params(),
            "active_parameters": model.active_params(),
            "kv_elements_per_token": kv_elements(model),
            "lightning_state_bytes": lightning_state_bytes(model),
        },
        "flops": {
            "training_token": flops.training(model, length),
            "prefill": flops.prefill(model, train.seq_length),
            "decode_token": flops.decode(model, train.seq_length),
        },
        "lengths": [vars(compared(model, tokens)) for tokens in LENGTHS],
        "cluster": {"gpu": found.config.plan.gpu, "gpus": found.config.plan.gpus},
        "judged": found.search.judged,
        "layouts": [_layout(candidate, found.search) for candidate in found.search.to_list()],
        "tokens": found.tokens,
        "tokens_price": found.tokens_price and vars(found.tokens_price),
        "days_price": found.days_price and vars(found.days_price),
        "rl": found.rl and {**vars(found.rl), **_plain(found.rl)},
        "decoding": found.decoding and vars(found.decoding),
    }


def _plain(rl: RlCost) -> dict[str, Any]:
    return {"rollout": vars(rl.rollout), "price": vars(rl.price)}


def _layout(candidate: Candidate, among: Search) -> dict[str, Any]:
    cost = candidate.cost
    return {
        "parallel": vars(candidate.config.parallel),
        "micro_batch": candidate.config.train.micro_batch,
        "recompute": candidate.recompute,
        "fits": candidate.fits,
        "configured": among.is_configured(candidate),
        "memory": {**candidate.memory.parts(), "total": candidate.memory.total},
        "step_seconds": dict(cost.seconds) | {"total": cost.total},
        "tokens_per_second": cost.tokens_per_second,
        "tflops_per_gpu": cost.tflops,
        "mfu": cost.mfu,
        "overrides": candidate.overrides(),
    }
