"""Supervised steps on the tasks' reference answers, by the pretraining program, before RL: a model
that starts from nothing would never be rewarded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import torch.distributed as dist

from megatron_m1 import launcher
from megatron_m1.checkpoint import agreement
from megatron_m1.checkpoint.folders import from_latest
from megatron_m1.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from megatron_m1.config_checks import run_problems
from megatron_m1.data.indexed import IndexedWriter
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import ConfigError, InputError
from megatron_m1.files import whole
from megatron_m1.pretrain import pretrain
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.prompts import Prompts
from megatron_m1.rl.sources import open_prompts, open_tokenizer

_FINGERPRINT = "taught.json"
# Apart from the seed of the prompts, whose problems are to be new.
_OTHER_SEED = 0x7EAC4


def taught(config: RLConfig) -> RLConfig:
    """The run with the taught model to start from, where teaching is asked for and no checkpoint of
    its own exists. Collective.

    A model that the same configuration taught before is taken again.

    Raises:
        ConfigError: ``teach`` describes no run of pretraining.
    """
    if not config.teach.steps or agreement.on_first(lambda: from_latest(config.checkpoint_dir)):
        return config
    folder = Path(config.run_dir) / "taught"
    problems = run_problems(_as_pretraining(config, folder), dist.get_world_size())
    if problems:
        raise ConfigError([f"teach, which is a run of pretraining: {one}" for one in problems])
    wanted = _fingerprint(config)
    if agreement.on_first(lambda: _known(folder)) == wanted:
        _say(f"{folder}: taught before")
    else:
        agreement.on_first(lambda: _prepare(config, folder))
        pretrain(_as_pretraining(config, folder))
        agreement.on_first(lambda: _remember(folder, wanted))
    return replace(config, checkpoint=replace(config.checkpoint, load=str(folder)))


def _fingerprint(config: RLConfig) -> str:
    """Of everything that the taught weights depend on."""
    parts = {
        "model": asdict(config.model),
        "data": asdict(config.data),
        "teach": asdict(config.teach),
        "precision": config.train.precision,
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _known(folder: Path) -> str | None:
    path = folder / _FINGERPRINT
    return json.loads(path.read_text()) if path.exists() else None


def _remember(folder: Path, fingerprint: str) -> None:
    with whole(folder / _FINGERPRINT) as partial:
        partial.write_text(json.dumps(fingerprint))


def _prepare(config: RLConfig, folder: Path) -> None:
    """Make room and write the examples as a dataset of documents."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        tokenizer = open_tokenizer(config)
        tokenizer.save(folder / "tokenizer.json")
        prompts = open_prompts(config, config.seed ^ _OTHER_SEED)
        with IndexedWriter(folder / "examples", config.model.vocab_size) as writer:
            for position in range(config.teach.examples):
                writer.add(np.array(_document(prompts, position, tokenizer, config.teach.wrong)))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error


def _document(prompts: Prompts, position: int, tokenizer: Tokenizer, wrong: float) -> list[int]:
    prompt = teacher = prompts.prompt(position)
    if Random(position).random() < wrong:
        others = map(prompts.prompt, count(position + 1))
        teacher = next(other for other in others if other.data_source == prompt.data_source)
    answer = teacher.extra_info["answer"]
    return [*tokenizer.encode(prompt.text), *tokenizer.encode(answer), tokenizer.eod]


def _as_pretraining(config: RLConfig, folder: Path) -> RunConfig:
    teach = config.teach
    return RunConfig(
        model=replace(config.model, aux_loss_coef=teach.aux_loss_coef),
        parallel=config.parallel,
        data=DataConfig(
            corpus="indexed",
            train=[str(folder / "examples")],
            tokenizer=str(folder / "tokenizer.json"),
            eod=config.data.eod,
        ),
        optim=OptimConfig(
            lr=teach.lr,
            min_lr=teach.lr / 10,
            warmup_steps=teach.warmup_steps,
            distributed=config.optim.distributed,
        ),
        train=TrainConfig(
            steps=teach.steps,
            global_batch=teach.batch,
            micro_batch=teach.micro_batch,
            seq_length=teach.seq_length,
            precision=config.train.precision,
            report=False,
        ),
        checkpoint=CheckpointConfig(async_save=False),
        logger=replace(config.logger, wandb="disabled", tensorboard=False),
        run_dir=str(folder),
        seed=config.seed,
    )


def _say(text: str) -> None:
    if launcher.is_first_process():
        print(text, flush=True)
