"""Generation by running the whole text through the model again for each token: the plain twin."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from megatron_m1.inference import draws
from megatron_m1.inference.requests import Continuation, Sequence
from megatron_m1.inference.sampling import draw
from megatron_m1.model.build import forward_row
from parallel.packing import PackedRow


@torch.no_grad()
def continued(chunk: nn.Module, sequence: Sequence, stop: int | None = None) -> Continuation:
    """One process, one sequence, no cache."""
    found = Continuation(finish="length")
    sampling = sequence.sampling
    stream = np.array([draws.stream(sequence.seed, sequence.prompt_id, sequence.index)], np.uint64)
    for position in range(sampling.max_new_tokens):
        logits = last_logits(chunk, [*sequence.prompt, *found.tokens])
        token, drawn, own = draw(
            logits[None],
            draws.uniforms(stream, np.array([position])),
            np.array([sampling.temperature]),
            np.array([sampling.top_k]),
            np.array([sampling.top_p]),
        )[0].tolist()
        found.tokens.append(int(token))
        found.logprobs.append(drawn)
        found.raw_logprobs.append(own)
        found.versions.append(0)
        if token == stop:
            found.finish = "stop"
            break
    found.experts = chosen_experts(chunk, [*sequence.prompt, *found.tokens[:-1]])
    return found


def last_logits(chunk: nn.Module, tokens: list[int]) -> Tensor:
    row = PackedRow.from_documents([torch.tensor(tokens)])
    return forward_row(chunk.eval(), row, with_loss=False)[0, -1]


def chosen_experts(chunk: nn.Module, tokens: list[int]) -> Tensor:
    """[T, layers, topk], seen by hooks on the routers, which training calls."""
    found: list[Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(
            lambda router, args, output: found.append(output[0].topk(router.topk).indices)
        )
        for layer in chunk.decoder.layers
    ]
    with torch.enable_grad():
        last_logits(chunk, tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).short()
