"""A small trained checkpoint, loaded into any layout."""

from __future__ import annotations

from pathlib import Path

from megatron_m1.checkpoint import store
from megatron_m1.inference.load import Loaded, load_model
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.training.small_run import small_config, start, write_data

LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one_process": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "ep2": (2, Layout(ep=2)),
}


def train_and_save(folder: str) -> Path:
    """Three steps, then the checkpoint's folder."""
    run = start(small_config(folder, write_data(Path(folder))))
    for _ in range(3):
        train_step(run)
    return store.save(run)


def load_into(layout: Layout, checkpoint: Path) -> Loaded:
    layout.build_groups()
    return load_model(checkpoint, layout, "fp32")
