"""A long run of a small model through faults drawn at random, restarted as a job scheduler would,
compared step for step with a run that meets none of them.

    python tools/soak.py [--faults 200] [--seed 0] [--processes 2] [--gap 8] [--out runs/soak]
                         [--kinds KIND ...] [--json FILE]

Every kind is drawn equally often. The other run meets the numerical faults alone (nan_loss,
nan_gradient): a step that is skipped is another step. The processes of an attempt are forked from
one that has imported the program, so that a restart takes about a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_m1.checkpoint import manifest
from megatron_m1.checkpoint.folders import step_folder
from megatron_m1.errors import EXIT_HANG, EXIT_INPUT, EXIT_STOPPED, EXIT_STORAGE
from megatron_m1.observe.records import METRICS_FILE, read_records
from megatron_m1.training.faults.plan import KINDS, Fault

NUMERICAL = ("nan_loss", "nan_gradient")
COMPARED = ("train/loss", "optim/grad_norm", "train/tokens", "train/samples", "optim/skipped")
# After these a scheduler starts the job again: what a full disk or unreadable data need is mended.
RESTARTED = (1, EXIT_STORAGE, EXIT_INPUT, EXIT_STOPPED, EXIT_HANG)
EVERY = 10
BATCH = 4
WATCHDOG_SECONDS = 6.0
# How long the other processes of an attempt may take to say why they end too.
LAST_WORDS = 1.0


@dataclass
class Attempt:
    """One start of the processes."""

    code: int
    seconds: float


@dataclass
class Outcome:
    """What became of one fault.

    Attributes:
        seconds: from the fault until the run was a step further than it, less a usual step; None
            where it never got there.
    """

    fault: Fault
    is_made: bool
    seconds: float | None


@dataclass
class Verdict:
    """What the whole drill showed; ``problems`` is empty where everything was as without faults."""

    steps: int
    attempts: int
    seconds: float
    reference_seconds: float
    outcomes: list[Outcome]
    codes: dict[str, int]
    problems: list[str] = field(default_factory=list)


def draw(count: int, kinds: Sequence[str], processes: int, gap: int, seed: int) -> list[Fault]:
    """Faults of all kinds in random order, about ``gap`` steps apart, each on a random process.

    A full disk comes when a checkpoint is due, and has some steps to be noticed. After a numerical
    fault two checkpoints are written before the next one: a run that goes back behind it would not
    meet it again.
    """
    random_ = random.Random(seed)
    found, step = [], 2 * EVERY
    while len(found) < count:
        for kind in random_.sample(kinds, len(kinds))[: count - len(found)]:
            step += random_.randint(max(1, gap // 2), gap + gap // 2)
            if kind == "disk_full":
                step = _next_save(step)
            found.append(Fault(kind, step, random_.randrange(processes)))
            if kind == "disk_full":
                step += EVERY // 2
            if kind in NUMERICAL:
                step = _next_save(step) + EVERY + gap // 2
    return found


def _next_save(step: int) -> int:
    return -(-step // EVERY) * EVERY


def write_data(prefix: Path) -> None:
    from megatron_m1.data.indexed import IndexedWriter

    random_ = np.random.RandomState(0)
    with IndexedWriter(prefix, vocab_size=64) as writer:
        for length in random_.geometric(0.04, size=2000).clip(1, 200):
            steps = random_.choice([1, 1, 1, 5], size=length)
            writer.add((random_.randint(64) + steps.cumsum()) % 64)


def arguments(run_dir: Path, data: Path, steps: int, faults: Sequence[Fault]) -> list[str]:
    return [
        *("model=tiny", "model.num_layers=2", "model.layer_pattern=LS", "model.hidden_size=32"),
        *("model.num_attention_heads=2", "model.num_query_groups=1", "model.head_dim=16"),
        *("model.rotary_dim=8", "model.ffn_hidden_size=32", "model.num_experts=4"),
        *("model.vocab_size=64", "data=indexed", f"data.train=[{data}]", "logger=quiet"),
        *("train.seq_length=64", f"train.global_batch={BATCH}", "train.micro_batch=1"),
        *("train.precision=fp32", "train.report=false", f"train.steps={steps}"),
        *(f"checkpoint.every={EVERY}", f"train.watchdog_seconds={WATCHDOG_SECONDS}"),
        *("logger.moe_load_every=0", "train.straggler_every=10", "optim.shape=constant"),
        *(f"run_dir={run_dir}", f"fault=[{','.join(map(str, faults))}]"),
    ]


class Supervisor:
    """Starts the processes of a run again until it is finished, as a scheduler does."""

    def __init__(self, processes: int, log: Path) -> None:
        self._processes = processes
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tools.soak_preload"])

    def run(self, words: list[str], most: int) -> list[Attempt]:
        """All attempts, the last of which finished or cannot be helped."""
        attempts: list[Attempt] = []
        while len(attempts) < most and (not attempts or attempts[-1].code in RESTARTED):
            attempts.append(self._attempt(words))
        return attempts

    def _attempt(self, words: list[str]) -> Attempt:
        """Until all processes ended; the code is that of the first that failed."""
        started, port = time.monotonic(), _free_port()
        ranks = [
            self._context.Process(
                target=_program, args=(words, rank, self._processes, port, str(self._log))
            )
            for rank in range(self._processes)
        ]
        for process in ranks:
            process.start()
        code = 0
        while not code and any(process.is_alive() for process in ranks):
            time.sleep(0.02)
            code = next((process.exitcode for process in ranks if process.exitcode), 0)
        for process in ranks:
            process.join(LAST_WORDS if code else None)
            if process.is_alive():
                # One that is stopped hears nothing else.
                process.kill()
                process.join()
        # What is killed by a signal has a negative code; to a scheduler it is a failure.
        return Attempt(1 if code < 0 else code, time.monotonic() - started)


def _program(words: list[str], rank: int, world: int, port: int, log: str) -> None:
    """A process of an attempt: the program as from the command line."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    from megatron_m1 import pretrain
    from megatron_m1.config import RunConfig
    from megatron_m1.config_loading import main

    torch.set_num_threads(1)
    sys.argv = ["pretrain", *words]
    main("pretrain", RunConfig, pretrain.run)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clock:
    """When each step was recorded, read off a run's metrics while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._over = threading.Event()
        self.events: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._over.wait(0.02):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        # A run that goes on writes the file anew.
        if self._file is None or os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino:
            self._file = self._path.open()
        start = self._file.tell()
        while (line := self._file.readline()).endswith("\n"):
            start = self._file.tell()
            if '"train/loss"' in line:
                self.events.append((time.time(), json.loads(line)["step"]))
        self._file.seek(start)


def outcomes(faults: Sequence[Fault], run_dir: Path, clock: Clock, usual: float) -> list[Outcome]:
    found = []
    for fault in faults:
        record = run_dir / "faults" / str(fault)
        made = float(record.read_text()) if record.exists() else None
        past = [when for when, step in clock.events if made and when > made and step > fault.step]
        seconds = max(0.0, min(past) - made - 2 * usual) if made and past else None
        found.append(Outcome(fault, made is not None, seconds))
    return found


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """What is compared of each record of a step; NaN equals NaN as text."""
    records = [record for record in read_records(run_dir / METRICS_FILE) if "train/loss" in record]
    return [
        {"step": record["step"], **{name: repr(record.get(name)) for name in COMPARED}}
        for record in records
    ]


def differences(run: Path, reference: Path, steps: int) -> list[str]:
    """Where a run differs from the other: in a step, a sample, or a checkpoint."""
    ours, theirs = curve(run), curve(reference)
    found = []
    if [record["step"] for record in ours] != list(range(1, steps + 1)):
        found.append("the records are not those of each step once, in order")
    found += [
        f"step {b['step']}: {a} is not {b}" for a, b in zip(ours, theirs, strict=False) if a != b
    ][:3]
    final = [f"{BATCH * steps}"]
    if [record["train/samples"] for record in ours[-1:]] != final:
        found.append(f"the last record does not have {final[0]} samples")
    for step in range(EVERY, steps + 1, EVERY):
        found += _checkpoint_problems(step_folder(run / "checkpoints", step))
    last = step_folder(Path("checkpoints"), steps)
    if _tensors(run / last) != _tensors(reference / last):
        found.append("the last checkpoints hold different tensors")
    return found


def _checkpoint_problems(folder: Path) -> list[str]:
    try:
        files = manifest.read(folder)
        if files is None:
            return [f"{folder.name} is missing"]
        manifest.check(folder, files, files, is_full=True)
    except manifest.Damaged as error:
        return [str(error)]
    return []


def _tensors(folder: Path) -> dict[str, str]:
    files = manifest.read(folder) or {}
    return {name: entry.sha256 for name, entry in files.items() if name.endswith(".distcp")}


def drill(options: argparse.Namespace) -> Verdict:
    out = Path(options.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_data(out / "data")
    faults = draw(options.faults, options.kinds, options.processes, options.gap, options.seed)
    steps = _next_save(max(fault.step for fault in faults) + EVERY)

    reference = out / "reference"
    numerical = [fault for fault in faults if fault.kind in NUMERICAL]
    supervisor = Supervisor(options.processes, out / "reference.log")
    (whole,) = supervisor.run(arguments(reference, out / "data", steps, numerical), most=1)
    if whole.code:
        raise SystemExit(f"error: the run without faults ended with {whole.code}, see {out}")

    run = out / "run"
    started = time.monotonic()
    with Clock(run / METRICS_FILE) as clock:
        attempts = Supervisor(options.processes, out / "run.log").run(
            arguments(run, out / "data", steps, faults), most=2 * len(faults) + 2
        )
    seconds = time.monotonic() - started
    usual = statistics.median(
        record["time/step"] for record in read_records(run / METRICS_FILE) if "time/step" in record
    )
    codes = [attempt.code for attempt in attempts]
    verdict = Verdict(
        steps,
        len(attempts),
        round(seconds, 1),
        round(whole.seconds, 1),
        outcomes(faults, run, clock, usual),
        {str(code): codes.count(code) for code in sorted(set(codes))},
    )
    if codes[-1]:
        verdict.problems.append(f"the run ended with {codes[-1]}, see {out / 'run.log'}")
    else:
        verdict.problems += differences(run, reference, steps)
    return verdict


def table(verdict: Verdict) -> str:
    lines = ["| kind | injected | survived | seconds lost, median | longest |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for kind in sorted({outcome.fault.kind for outcome in verdict.outcomes}):
        of_kind = [outcome for outcome in verdict.outcomes if outcome.fault.kind == kind]
        lost = [outcome.seconds for outcome in of_kind if outcome.seconds is not None]
        made = sum(outcome.is_made for outcome in of_kind)
        numbers = f"{statistics.median(lost):.1f} | {max(lost):.1f}" if lost else "- | -"
        lines.append(f"| `{kind}` | {made} | {len(lost)} | {numbers} |")
    return "\n".join(lines)


def as_json(verdict: Verdict, options: argparse.Namespace) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return {
        **asdict(verdict),
        "options": vars(options),
        "python": platform.python_version(),
        "versions": versions,
        "cores": os.cpu_count(),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gap", type=int, default=8, help="steps between two faults, on average")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--out", default="runs/soak", help="folder, which is emptied first")
    parser.add_argument("--json", help="where the numbers go; OUT/soak.json where it is not given")
    options = parser.parse_args(words)
    verdict = drill(options)
    path = Path(options.json or Path(options.out) / "soak.json")
    path.write_text(json.dumps(as_json(verdict, options), indent=1))
    print(table(verdict))
    print(
        f"\n{len(verdict.outcomes)} faults over {verdict.steps} steps: {verdict.attempts} starts, "
        f"exit codes {verdict.codes}, {verdict.seconds} s, without faults "
        f"{verdict.reference_seconds} s"
    )
    for problem in verdict.problems:
        print(f"error: {problem}", file=sys.stderr)
    if not verdict.problems:
        print("every step, sample and checkpoint is as without faults")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
