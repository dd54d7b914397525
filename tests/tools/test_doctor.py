"""tools/doctor.py as a command, and what its checks make of machines that are not here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_m1.cluster.doctor import gpus, kernels, network, software, storage, together
from megatron_m1.cluster.doctor.finding import (
    NOT_CHECKED,
    OK,
    PROBLEM,
    WARNING,
    Finding,
    as_text,
    breaks_a_run,
    merged,
)
from megatron_m1.errors import EXIT_UNFIT, EXIT_USAGE
from tests.distributed import Pool

ROOT = Path(__file__).resolve().parents[2]


def doctor(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/doctor.py", "--seconds", "0.2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )


@pytest.fixture(scope="module")
def here() -> dict[str, Finding]:
    """The findings on this machine, the last one of each check."""
    done = doctor("--json")
    found = json.loads(done.stdout)
    findings = {each["check"]: Finding(**each) for each in found["findings"]}
    assert (done.returncode, found["fit"]) == (0, True), done.stdout + done.stderr
    return findings


def test_this_machine_is_fit(here: dict[str, Finding]) -> None:
    for check in ("python", "torch", "megatron-core", "name", "port", "meeting", "all-reduce"):
        assert here[check].outcome == OK, here[check]
    assert here["lightning attention"].found.endswith("equals the reference")
    assert "over 2 processes" in here["all-reduce"].found or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_cannot_be_checked_is_not_called_well(here: dict[str, Finding]) -> None:
    assert [here[check].outcome for check in ("GPU", "NCCL", "clock")] == [NOT_CHECKED] * 3


@pytest.mark.gpu
def test_cards_are_found(here: dict[str, Finding]) -> None:
    assert here["GPU"].outcome != NOT_CHECKED and here["NCCL"].outcome == OK


def test_what_breaks_a_run_ends_with_a_code_and_an_advice() -> None:
    done = doctor("--gpus", "99", GLOO_SOCKET_IFNAME="nowhere0")
    assert done.returncode == EXIT_UNFIT
    lines = done.stdout.splitlines()
    for what in ("99 are needed", "GLOO_SOCKET_IFNAME=nowhere0, but the interfaces are"):
        (index,) = (number for number, line in enumerate(lines) if what in line)
        assert lines[index].startswith("problem ")
        assert lines[index + 1].lstrip().startswith("-> ")


def test_nodes_need_a_process_on_each() -> None:
    done = doctor("--nodes", "2")
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert "srun --nodes 2 --ntasks-per-node 1 python tools/doctor.py --nodes 2" in done.stderr


def test_a_folder_that_cannot_be_written_breaks_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = (each for each in storage.examine(tmp_path / "file", False) if each.check == "disk")
    assert found.outcome == PROBLEM and "cannot be written" in found.found


def test_versions_are_those_that_the_project_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.3.0", "megatron-core": "0.16.1", "transformer-engine": "1.9"}

    def version(name: str) -> str:
        if name == "hydra-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or "100"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.check: each for each in software.examine()}
    assert found["torch"].outcome == PROBLEM and "2.3.0, but " in found["torch"].found
    assert found["hydra-core"].found.startswith("not installed, ")
    assert found["megatron-core"].outcome == OK
    assert found["transformer-engine"].outcome == WARNING


def test_forgotten_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    found = [each for each in software.examine() if each.check == "environment"]
    assert [each.advice for each in found] == ["unset CUDA_LAUNCH_BLOCKING"]


def write_rails(folder: Path, states: list[str]) -> Path:
    for index, state in enumerate(states):
        port = folder / f"mlx5_{index}/ports/1"
        port.mkdir(parents=True)
        for name, text in (
            ("state", state),
            ("rate", "400 Gb/sec (4X NDR)"),
            ("link_layer", "InfiniBand"),
        ):
            (port / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("states", "outcome", "text"),
    [
        (["4: ACTIVE"] * 8, OK, "8 of 8 ports are up: InfiniBand 400 Gb/sec (4X NDR)"),
        (["4: ACTIVE"] * 7 + ["1: DOWN"], WARNING, "7 of 8 ports are up"),
        (["1: DOWN"] * 2, PROBLEM, "0 of 2 ports are up: none"),
        ([], WARNING, "no device: NCCL uses sockets"),
    ],
)
def test_rails(states: list[str], outcome: str, text: str, tmp_path: Path) -> None:
    found = next(iter(network.examine(8, 2, write_rails(tmp_path, states))))
    assert (found.check, found.outcome) == ("InfiniBand", outcome)
    assert text in found.found
    assert bool(found.advice) == (outcome != OK)
    if "1: DOWN" in states:
        assert f"mlx5_{len(states) - 1}:1" in found.advice


@pytest.mark.parametrize(("version", "outcome"), [("525.60.13", OK), ("470.82.01", PROBLEM)])
def test_drivers(version: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert gpus._driver(version).outcome == outcome


def test_a_port_that_is_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        found = network.port_finding("127.0.0.1", taken.getsockname()[1])
    assert found.outcome == PROBLEM and "in use" in found.found


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = kernels.lightning_attention

    def wrong(*args, backend: str, **kwargs):
        output = true(*args, backend=backend, **kwargs)
        return output if backend == "reference" else output * 1.01

    monkeypatch.setattr(kernels, "lightning_attention", wrong)
    found = kernels.examine()
    assert found.outcome == PROBLEM and "1.0e-02 from the reference" in found.found
    monkeypatch.undo()
    assert kernels.examine().outcome == OK


def together_with_a_wrong_sum(rank_of_the_wrong: int) -> list[Finding]:
    import torch.distributed as dist

    right = dist.all_reduce

    def wrong(tensor, *args, **kwargs):
        right(tensor, *args, **kwargs)
        if dist.get_rank() == rank_of_the_wrong and tensor.numel() > 1000:
            tensor[7] += 1

    dist.all_reduce = wrong
    try:
        return list(together.examine(0.05, nodes=2))
    finally:
        dist.all_reduce = right


def test_sums_are_compared_on_every_process(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(together_with_a_wrong_sum, 1)
    assert first == second
    found = {each.check: each for each in first}
    assert found["all-reduce"].outcome == PROBLEM and "sums are wrong" in found["all-reduce"].found
    assert found["meeting"].found.endswith("on 1 nodes by gloo, but --nodes 2")


def test_what_nodes_say_alike_is_said_once() -> None:
    fine = Finding("disk", OK, "100 GB free")
    full = Finding("disk", PROBLEM, "0 bytes free", "make room")
    hosts = [f"n{index}" for index in range(8)]
    all_of_them = [replace(fine, hosts=(host,)) for host in hosts]
    all_of_them[3] = replace(full, hosts=("n3",))
    found = merged(all_of_them)
    assert [len(each.hosts) for each in found] == [7, 1]
    text = as_text(found)
    assert "100 GB free (n0, n1, n2, n4 and 3 more)" in text
    assert "0 bytes free (n3)" in text and "-> make room" in text
    assert text.endswith("problem: 1, warning: 0, not checked: 0")
    assert breaks_a_run(found) and not breaks_a_run([fine])
