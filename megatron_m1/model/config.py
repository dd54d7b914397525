"""The shape of a model, and what follows from the shape: parameters and floating-point operations.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2 and 4.2, and the released ``config.json`` of
MiniMax-M1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LIGHTNING, SOFTMAX = "L", "S"
INIT_METHODS = ("xavier_normal", "truncated_normal")
DROP_POLICIES = ("probs", "position")
CAPACITY_SCOPES = ("rank", "micro_batch", "ep")


@dataclass
class InitConfig:
    """How weights start.

    The paper states Xavier initialisation and DeepNorm with alpha = (2N)^0.25, beta = (8N)^-0.25
    (MiniMax-01, section 4.2). It does not say which matrices beta scales; ``deepnorm_gain`` follows
    DeepNet (arXiv 2203.00555, section 2.2): values, output projections and feed-forward matrices.
    The truncated normal (cut at three standard deviations) is ours, for comparison.
    """

    method: str = "xavier_normal"
    std: float = 0.02
    deepnorm_gain: bool = True


@dataclass
class ModelConfig:
    """Sizes of a MiniMax-M1-shaped model.

    Attributes:
        layer_pattern: one letter a layer, L lightning and S softmax, repeated over the depth.
        rotary_dim: how many of the head's dimensions softmax attention rotates (from the first).
        deepnorm_alpha: forward weight of the residual; None is (2 * num_layers)^0.25.
        deepnorm_beta: forward weight of the branch (1.0 in the released model).
        aux_loss_coef: weight of the load-balancing loss in Megatron's scale, where a balanced
            router has loss 1; 0 for none. The paper's 0.01 is in another scale that it does not
            fix.
        z_loss_coef: weight of the mean squared log-sum-exp of the router's logits; 0 for none.
        capacity_factor: tokens an expert takes, in units of its fair share; None drops none.
        drop_policy: whose tokens an expert takes first: the most probable, or the first in the row.
        capacity_scope: whose tokens share the capacity: each rank's its own, those of the
            micro-batch over all ranks (the same drops in every layout), or those of all ranks that
            exchange tokens (etp x ep), which is the global router of MiniMax-01.
    """

    name: str = "tiny"
    num_layers: int = 8
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 2
    head_dim: int = 32
    rotary_dim: int = 16
    rope_theta: float = 10_000.0
    ffn_hidden_size: int = 128
    num_experts: int = 8
    router_topk: int = 2
    vocab_size: int = 4096
    layer_pattern: str = "LLLLLLLS"
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    deepnorm_alpha: float | None = None
    deepnorm_beta: float = 1.0
    aux_loss_coef: float = 1e-3
    z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    drop_policy: str = "probs"
    capacity_scope: str = "ep"
    fp32_lm_head: bool = True
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def layer_kinds(self) -> str:
        """One letter for each layer, from the first to the last."""
        repeats = -(-self.num_layers // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.num_layers]

    @property
    def residual_alpha(self) -> float:
        return (2 * self.num_layers) ** 0.25 if self.deepnorm_alpha is None else self.deepnorm_alpha

    def attention_params(self, kind: str) -> int:
        """Parameters of one attention block with its own norm, without the layer's two norms."""
        inner = self.num_attention_heads * self.head_dim
        if kind == LIGHTNING:
            return self.hidden_size * (3 + 1 + 1) * inner + inner
        key_value = 2 * self.num_query_groups * self.head_dim
        return self.hidden_size * (2 * inner + key_value)

    def expert_params(self) -> int:
        return 3 * self.hidden_size * self.ffn_hidden_size

    def router_params(self) -> int:
        return self.num_experts * self.hidden_size

    def layer_params(self, kind: str, experts: int) -> int:
        """Parameters of one layer of which ``experts`` experts are counted."""
        return (
            self.attention_params(kind)
            + self.router_params()
            + experts * self.expert_params()
            + 2 * self.hidden_size
        )

    def num_params(self) -> int:
        """All parameters: layers, final norm, embedding and LM head."""
        layers = sum(self.layer_params(kind, self.num_experts) for kind in self.layer_kinds)
        return layers + self.hidden_size + 2 * self.vocab_size * self.hidden_size

    def active_params(self) -> int:
        """Parameters that one token meets, without embedding and LM head."""
        layers = sum(self.layer_params(kind, self.router_topk) for kind in self.layer_kinds)
        return layers + self.hidden_size

    def layer_flops(self, kind: str, keys: float) -> dict[str, float]:
        """Floating-point operations of one token going forward through one layer, by its pieces.

        A weight of a matrix product costs 2. In softmax attention a key that a query sees costs 2
        for each of the head's dimensions, and its value as much; lightning attention costs the
        update and the reading of its state, 2 D^2 a head each. What has no matrix product (norms,
        activations, rotation, softmax) is not counted.

        Args:
            keys: how many tokens the query sees, itself included.
        """
        inner = self.num_attention_heads * self.head_dim
        is_lightning = kind == LIGHTNING
        groups = self.num_query_groups * self.head_dim
        projections = 5 * inner if is_lightning else 2 * (inner + groups)
        return {
            "projections": 2.0 * self.hidden_size * projections,
            "attention": 4.0 * inner * (self.head_dim if is_lightning else keys),
            "router": 2.0 * self.router_params(),
            "experts": 2.0 * self.router_topk * self.expert_params(),
        }

    def forward_flops(self, keys: float) -> dict[str, float]:
        """Those of the whole model, by its pieces."""
        lightning, softmax = (
            {piece: self.layer_kinds.count(kind) * flops for piece, flops in found.items()}
            for kind in (LIGHTNING, SOFTMAX)
            for found in [self.layer_flops(kind, keys)]
        )
        return {
            "lightning projections": lightning["projections"],
            "lightning attention": lightning["attention"],
            "softmax projections": softmax["projections"],
            "softmax attention": softmax["attention"],
            "router": lightning["router"] + softmax["router"],
            "experts": lightning["experts"] + softmax["experts"],
            "head": 2.0 * self.vocab_size * self.hidden_size,
        }

    def flops_per_token(self, mean_length: float) -> float:
        """Floating-point operations of one training step for one token: the backward pass costs
        twice the forward, and over causal documents of ``mean_length`` tokens (weighted by tokens)
        a token sees half of them. Recomputation is not counted, as in MFU (arXiv 2204.02311,
        appendix B).
        """
        return 3.0 * sum(self.forward_flops(mean_length / 2).values())

    def problems(self) -> list[str]:
        """What is wrong with the sizes themselves, one sentence each."""
        found = [
            f"model.{name}={getattr(self, name)} must be at least 1"
            for name in _POSITIVE
            if getattr(self, name) < 1
        ]
        if found:
            return found
        if set(self.layer_pattern) - {LIGHTNING, SOFTMAX} or not self.layer_pattern:
            found.append(
                f"model.layer_pattern={self.layer_pattern!r} may hold only L (lightning) and S "
                "(softmax), for example LLLLLLLS"
            )
        if self.num_attention_heads % self.num_query_groups:
            found.append(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"model.num_query_groups={self.num_query_groups}"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            found.append(
                f"model.rotary_dim={self.rotary_dim} must be even and at most "
                f"model.head_dim={self.head_dim}"
            )
        for name in ("norm_eps", "lightning_norm_eps", "rope_theta", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"model.{name}={value} must be positive")
        for name, value in (
            ("aux_loss_coef", self.aux_loss_coef),
            ("z_loss_coef", self.z_loss_coef),
            ("init.std", self.init.std),
        ):
            if value < 0:
                found.append(f"model.{name}={value} must not be negative")
        if self.router_topk > self.num_experts:
            found.append(
                f"model.router_topk={self.router_topk} is more than "
                f"model.num_experts={self.num_experts}"
            )
        for key, value, choices in (
            ("init.method", self.init.method, INIT_METHODS),
            ("drop_policy", self.drop_policy, DROP_POLICIES),
            ("capacity_scope", self.capacity_scope, CAPACITY_SCOPES),
        ):
            if value not in choices:
                found.append(f"model.{key}={value} is not one of {', '.join(choices)}")
        return found


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "num_experts",
    "router_topk",
    "vocab_size",
)
