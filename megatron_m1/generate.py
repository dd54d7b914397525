"""Continue a prompt with a trained model, printing text as it comes.

python -m megatron_m1.generate checkpoint.load=runs/tiny prompt="def "
"""

from __future__ import annotations

from megatron_m1 import launcher
from megatron_m1.config import GenerateConfig
from megatron_m1.config_checks import generate_problems
from megatron_m1.config_loading import main
from megatron_m1.errors import ConfigError


def run(config: GenerateConfig) -> None:
    problems = generate_problems(config)
    if problems:
        raise ConfigError(problems)
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    from megatron_m1.inference.load import load_tokenizer, trained_model
    from megatron_m1.inference.requests import SamplingParams
    from megatron_m1.inference.text import continue_text

    with trained_model(config.checkpoint, config.parallel, config.precision) as loaded:
        tokenizer = load_tokenizer(config.tokenizer, config.eod, loaded)
        sampling = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
        )
        pieces = continue_text(loaded.chunks, tokenizer, config.prompt, sampling, config.seed)
        _show(config.prompt)
        for piece in pieces:
            _show(piece)
        _show("\n")


def _show(text: str) -> None:
    if launcher.is_first_process():
        print(text, end="", flush=True)


if __name__ == "__main__":
    main("generate", GenerateConfig, run)
