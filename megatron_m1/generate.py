"""Continue a prompt with a trained model, printing text as it comes.

python -m megatron_m1.generate checkpoint.load=runs/tiny prompt="def "
"""

from __future__ import annotations

from parallel import host

host.enable()

from megatron_m1 import runtime  # noqa: E402
from megatron_m1.config import GenerateConfig  # noqa: E402
from megatron_m1.config_loading import main  # noqa: E402
from megatron_m1.data.tokenizer import Tokenizer  # noqa: E402
from megatron_m1.errors import InputError  # noqa: E402
from megatron_m1.inference.load import trained_model  # noqa: E402
from megatron_m1.inference.sampling import Sampling, continue_text  # noqa: E402


def run(config: GenerateConfig) -> None:
    with trained_model(config.checkpoint, config.parallel, config.precision) as loaded:
        try:
            tokenizer = Tokenizer.load(config.tokenizer or loaded.path, config.eod)
        except (OSError, ValueError) as error:
            raise InputError(f"{error}: give tokenizer=FILE") from error
        pieces = continue_text(
            loaded.chunks,
            config.parallel,
            tokenizer,
            config.prompt,
            config.max_new_tokens,
            Sampling(config.temperature, config.top_p, config.seed),
        )
        show = runtime.is_first_process()
        if show:
            print(config.prompt, end="", flush=True)
        for piece in pieces:
            if show:
                print(piece, end="", flush=True)
        if show:
            print()


if __name__ == "__main__":
    main("generate", GenerateConfig, run)
