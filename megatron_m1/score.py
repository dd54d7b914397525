"""Log-probabilities of given tokens under a trained model.

python -m megatron_m1.score checkpoint.load=runs/tiny tokens=ids.npy out=scores.npy
"""

from __future__ import annotations

from pathlib import Path

from megatron_m1 import launcher
from megatron_m1.config import ScoreConfig
from megatron_m1.config_checks import score_problems
from megatron_m1.config_loading import main
from megatron_m1.errors import ConfigError, InputError


def run(config: ScoreConfig) -> None:
    problems = score_problems(config)
    if problems:
        raise ConfigError(problems)
    folder = Path(config.out).parent
    if not folder.is_dir():
        raise InputError(f"out={config.out} cannot be written: there is no folder {folder}")
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    from megatron_m1.inference.load import trained_model
    from megatron_m1.inference.scoring import read_tokens, score, write_scores

    rows = read_tokens(config.tokens)
    with trained_model(config.checkpoint, config.parallel, config.precision) as loaded:
        scores = score(loaded, config.parallel, rows, config.micro_batch)
        if launcher.is_first_process():
            write_scores(scores, config.out)
            print(f"{config.out}: log-probabilities of {len(scores)} row(s)")


if __name__ == "__main__":
    main("score", ScoreConfig, run)
