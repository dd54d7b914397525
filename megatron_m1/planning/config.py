"""The keys of the planner: a pretraining run, and under ``plan`` the cluster that it is to run on.

Degrees are searched over the lists of ``plan.search``; what else is set under ``parallel``,
``optim`` and ``train`` holds for every layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from megatron_m1.config import RunConfig


@dataclass
class Efficiency:
    """Shares of the peak that kernels reach, by what bounds them.

    Attributes:
        matmul: of the BF16 peak, in projections and a BF16 head.
        experts: of the BF16 peak, in the products of experts, which have fewer rows.
        attention: of the BF16 peak, in softmax attention.
        fp32: of the FP32 peak, in an FP32 head and the routers.
        lightning: of the memory bandwidth, in lightning attention: bytes that must move over time.
        memory: of the memory bandwidth, in everything element by element.
        links: of the bandwidth of NVLink and of the network.
    """

    matmul: float = 0.7
    experts: float = 0.6
    attention: float = 0.55
    fp32: float = 0.8
    lightning: float = 0.4
    memory: float = 0.75
    links: float = 0.75


@dataclass
class Search:
    """The degrees and settings to try, each with each; what does not divide is left out.

    Attributes:
        enabled: false plans for the degrees of ``parallel`` and the settings of ``train`` alone.
        vpp: virtual stages; 1 is none.
        recompute: none, core_attn, moe, core_attn+moe or full.
    """

    enabled: bool = True
    tp: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    pp: list[int] = field(default_factory=lambda: [1, 2, 4, 5, 8, 10, 16, 20])
    vpp: list[int] = field(default_factory=lambda: [1, 2, 5])
    ep: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    etp: list[int] = field(default_factory=lambda: [1])
    cp: list[int] = field(default_factory=lambda: [1])
    micro_batch: list[int] = field(default_factory=lambda: [1, 2, 4])
    recompute: list[str] = field(default_factory=lambda: ["none", "moe", "full"])


@dataclass
class RlRun:
    """A reinforcement-learning run on the same GPUs, which generate and train in turns.

    Attributes:
        steps: rounds of generation and training; 0 plans no such run.
        prompts, responses: prompts in a round, and responses to each of them.
        prompt_tokens, response_tokens: mean lengths.
        epochs: how often each response is trained on.
    """

    steps: int = 0
    prompts: int = 512
    responses: int = 16
    prompt_tokens: int = 1024
    response_tokens: int = 20_000
    epochs: int = 1


@dataclass
class Plan:
    """A cluster, its price, and what is asked of it.

    Attributes:
        gpu_memory_gb: memory of a GPU in GiB.
        reserved_gb: of it, for the CUDA context, NCCL, libraries' workspaces and fragmentation.
        bf16_tflops, fp32_tflops: dense peaks of a GPU, the second without tensor cores (no TF32).
        hbm_tb_per_s: memory bandwidth of a GPU.
        nvlink_gb_per_s, network_gb_per_s: of a GPU to its node and to other nodes, one way.
        latency_us: what a message takes beside its bytes.
        dollars_per_gpu_hour: None prices in hours alone.
        tokens: budget to price; None is that of ``train``.
        seq_length: tokens in a row; None is ``train.seq_length``.
        document_length: mean length of the document that a token is in; None is the row's.
        days: price this many days of the whole cluster as well.
        top: how many layouts to print.
    """

    gpu: str = "H800"
    nodes: int = 64
    gpus_per_node: int = 8
    gpu_memory_gb: float = 80.0
    reserved_gb: float = 10.0
    bf16_tflops: float = 989.4
    fp32_tflops: float = 66.9
    hbm_tb_per_s: float = 3.35
    nvlink_gb_per_s: float = 200.0
    network_gb_per_s: float = 50.0
    latency_us: float = 15.0
    dollars_per_gpu_hour: float | None = None
    tokens: int | None = None
    seq_length: int | None = None
    document_length: int | None = None
    days: float | None = None
    top: int = 10
    efficiency: Efficiency = field(default_factory=Efficiency)
    search: Search = field(default_factory=Search)
    rl: RlRun = field(default_factory=RlRun)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_gb(self) -> float:
        """GiB of a GPU that a run may fill."""
        return self.gpu_memory_gb - self.reserved_gb


@dataclass
class PlanConfig(RunConfig):
    """Every key of the planner: those of a pretraining run, and ``plan``."""

    plan: Plan = field(default_factory=Plan)

    def with_plan_applied(self) -> PlanConfig:
        """The same with ``plan.seq_length`` in the place of ``train.seq_length``."""
        length = self.plan.seq_length or self.train.seq_length
        return replace(self, train=replace(self.train, seq_length=length))


RECOMPUTE = {
    "none": ("none", []),
    "core_attn": ("selective", ["core_attn"]),
    "moe": ("selective", ["moe"]),
    "core_attn+moe": ("selective", ["core_attn", "moe"]),
    "full": ("full", []),
}
"""``train.recompute`` and ``train.recompute_modules`` of each word of ``plan.search.recompute``."""


def plan_problems(plan: Plan) -> list[str]:
    """What is wrong with the keys of the planner themselves, one sentence each."""
    found = []
    for section, value in (("", plan), ("rl.", plan.rl)):
        for item in fields(value):
            amount, key = getattr(value, item.name), f"plan.{section}{item.name}"
            if isinstance(amount, int | float) and amount <= 0 and key not in _MAY_BE_ZERO:
                found.append(f"{key}={amount} must be positive")
    for item in fields(plan.efficiency):
        share = getattr(plan.efficiency, item.name)
        if not 0 < share <= 1:
            found.append(f"plan.efficiency.{item.name}={share} must be in (0, 1]")
    if plan.reserved_gb >= plan.gpu_memory_gb:
        found.append(
            f"plan.reserved_gb={plan.reserved_gb} must be less than "
            f"plan.gpu_memory_gb={plan.gpu_memory_gb}"
        )
    return found + _search_problems(plan.search)


_MAY_BE_ZERO = ("plan.latency_us", "plan.reserved_gb", "plan.rl.steps", "plan.rl.prompt_tokens")


def _search_problems(search: Search) -> list[str]:
    found = []
    for item in fields(search):
        tried = getattr(search, item.name)
        if item.name == "enabled":
            continue
        if not tried:
            found.append(f"plan.search.{item.name}=[] tries nothing: give at least one value")
        for value in tried:
            if item.name == "recompute":
                if value not in RECOMPUTE:
                    choices = ", ".join(RECOMPUTE)
                    found.append(f"plan.search.recompute={value} is not one of {choices}")
            elif value < 1:
                found.append(f"plan.search.{item.name}={value} must be at least 1")
    return found
