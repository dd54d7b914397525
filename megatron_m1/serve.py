"""Serve a trained model over HTTP, in the way of OpenAI's completions.

python -m megatron_m1.serve checkpoint.load=runs/tiny server.port=8000
"""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack

from megatron_m1 import launcher
from megatron_m1.config import ServeConfig
from megatron_m1.config_checks import serve_problems
from megatron_m1.config_loading import main
from megatron_m1.errors import ConfigError


def run(config: ServeConfig) -> None:
    """Answer until SIGTERM or SIGINT."""
    problems = serve_problems(config)
    if problems:
        raise ConfigError(problems)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Under torchrun every process gets it; the first tells the others when to leave.
        signal.signal(number, lambda *_: stop.set())
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    from megatron_m1.checkpoint import agreement
    from megatron_m1.inference.load import load_tokenizer, trained_model
    from megatron_m1.serving.service import Service
    from megatron_m1.serving.web import listening

    with (
        trained_model(config.checkpoint, config.parallel, config.precision) as loaded,
        ExitStack() as stack,
    ):
        tokenizer = load_tokenizer(config.tokenizer, config.eod, loaded)
        service = Service(config, loaded, tokenizer, stop)

        url = agreement.on_first(lambda: stack.enter_context(listening(config.server, service)))
        if launcher.is_first_process():
            print(f"{loaded.path}: served at {url}", flush=True)
        service.run()


if __name__ == "__main__":
    main("serve", ServeConfig, run)
