"""How a run begins: its checkpoint, its folders, a word on standard output."""

from __future__ import annotations

from megatron_m1 import launcher
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.checkpoint.starting import start
from megatron_m1.dry_run import as_yaml
from megatron_m1.errors import InputError
from megatron_m1.files import whole
from megatron_m1.training.state import Training


def begin(run: Training) -> bool:
    """Bring a run to where it goes on from, and open its sinks. Collective.

    Returns:
        Whether anything is left to train.
    """
    asked = run.config.checkpoint
    with chosen(asked.load, run.checkpoint_dir, asked.verify) as checkpoint:
        started = start(run, checkpoint) if checkpoint else ""
    if launcher.is_first_process():
        _open_folders(run)
        if started:
            print(started, flush=True)
        if run.finished:
            print("nothing is left to train: give more train.steps, or another run_dir")
    if not run.finished:
        run.open_sinks()
    return not run.finished


def _open_folders(run: Training) -> None:
    """Make the run's folders before the first step, so that a path that cannot be written does not
    end the run at its first checkpoint."""
    try:
        run.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        run.dir.mkdir(parents=True, exist_ok=True)
        with whole(run.dir / "config.yaml") as partial:
            partial.write_text(as_yaml(run.config))
    except OSError as error:
        raise InputError(f"run_dir={run.dir} or checkpoint.dir: {error}") from error
