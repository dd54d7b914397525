"""Log-probabilities of given tokens under a trained model.

python -m megatron_m1.score checkpoint.load=runs/tiny tokens=ids.npy out=scores.npy
"""

from __future__ import annotations

from parallel import host

host.enable()

from megatron_m1 import runtime  # noqa: E402
from megatron_m1.config import ScoreConfig  # noqa: E402
from megatron_m1.config_loading import main  # noqa: E402
from megatron_m1.inference.load import trained_model  # noqa: E402
from megatron_m1.inference.scoring import read_tokens, score, write_scores  # noqa: E402


def run(config: ScoreConfig) -> None:
    rows = read_tokens(config.tokens)
    with trained_model(config.checkpoint, config.parallel, config.precision) as loaded:
        scores = score(loaded, config.parallel, rows, config.micro_batch)
        if runtime.is_first_process():
            write_scores(scores, config.out)
            print(f"{len(scores)} rows of log-probabilities in {config.out}")


if __name__ == "__main__":
    main("score", ScoreConfig, run)
