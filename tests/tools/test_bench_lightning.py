"""tools/bench_lightning.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.bench_lightning import check
from tools.lightning_peers import Ours, Peer, Shape

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("portable", "transformers", "einsum")


def test_every_peer_is_checked_timed_and_weighed(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--lengths", "256", "--seconds", "0.01", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "tools/bench_lightning.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    numbers = r"([\d.]+) +(\d+) +([\d.]+) +([\d.]+)% +([\d.]+)x"
    row = re.compile(rf"^  (forward(?: \+ backward)?) +(\w+) +{numbers}$", re.M)
    plain, packed = done.stdout.split("\nB 1, T 256, H 4, D 64, float32")[1:]
    for printed, peers in ((plain, PEERS), (packed, PEERS[:1])):
        rows = row.findall(printed)
        assert [(what, peer) for what, peer, *_ in rows] == [
            (what, peer) for what in ("forward", "forward + backward") for peer in peers
        ]
        assert all(float(ms) > 0 and int(ns) > 0 for _, _, ms, ns, *_ in rows)
        assert all(float(slower) == 1 for _, peer, *_, slower in rows if peer == PEERS[0])
    memory = re.findall(r"^  (\w+) +(\d+)$", done.stdout.split("Memory beyond the inputs")[1], re.M)
    assert [name for name, _ in memory] == ["tokens", *PEERS]

    report = json.loads(out.read_text())
    assert max(report["errors"]["B 1, T 1024, H 4, D 64, float32"]["portable"].values()) < 5e-6
    assert {time["peer"] for time in report["times"]} == set(PEERS)
    assert all(len(time["seconds"]) >= 3 for time in report["times"])


class Broken(Peer):
    name = "broken"

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        raise ImportError("another version\nis needed")


def test_a_peer_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(1, 40, 2, 16, torch.float32)
    assert list(check([Broken(), Ours("portable")], shape, torch.device("cpu"))) == ["portable"]
    assert re.search(r"^  broken +ImportError: another version$", capsys.readouterr().out, re.M)


def test_a_failure_of_ours_is_not_passed_over() -> None:
    class Wrong(Broken, Ours):
        pass

    shape = Shape(1, 40, 2, 16, torch.float32)
    with pytest.raises(ImportError, match="another version"):
        check([Wrong("portable")], shape, torch.device("cpu"))
