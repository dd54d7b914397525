"""Lets the trained model continue a prompt."""

from __future__ import annotations

from megatron_m1.inference.requests import SamplingParams
from megatron_m1.inference.text import continue_text
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.run import Run


class Sampler(Callback[Run]):
    """Shows a continuation of ``prompt`` when training ends, drawn from the likelier tokens: the
    most likely ones of a young model repeat themselves."""

    def __init__(self, prompt: str, tokens: int) -> None:
        self.prompt = prompt
        self.sampling = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=tokens)

    def on_end(self, run: Run) -> None:
        if run.config.parallel.vpp:
            # The interleaved schedule takes several rows at a time; generation has one.
            run.sinks.text(run.progress.step, "sample", "none: parallel.vpp serves training only")
            return
        assert run.tokenizer is not None
        pieces = continue_text(run.chunks, run.tokenizer, self.prompt, self.sampling)
        run.sinks.text(run.progress.step, "sample", self.prompt + "".join(pieces))
