"""tools/plan.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.config_loading import load
from megatron_m1.errors import EXIT_INPUT, EXIT_USAGE
from megatron_m1.planning.config import Plan, PlanConfig
from megatron_m1.planning.layouts import search
from tests.docs.test_docs import CODE, commands, section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/planning.md"
FEW = ["plan.search.tp=[4,8]", "plan.search.pp=[4,8]", "plan.search.ep=[8,32]"]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_text_json_and_picture(tmp_path: Path) -> None:
    files = ["--json", f"{tmp_path}/plan.json", "--plot", f"{tmp_path}/plan.png"]
    done = plan("model=m1_456b", *files, *FEW, "plan.days=21", "plan.rl.steps=10", "plan.top=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    titles = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("#")]
    assert titles[:3] == ["# model", "# operations", "# lengths"]
    for words in (
        "456,089,655,296 parameters; 45,944,920,064 active",
        "280.0 MiB of states",
        "20,480 BF16 numbers",
        "# layouts: 64 nodes x 8 H800, 80 GiB of which 10 are reserved; 2,048 rows x 8,192 tokens",
        "512 processes = pp ",
        "# decoding: 16 GPUs hold the model and ",
        "# price at $2.0721 a GPU-hour",
        "RL, 10 rounds",
    ):
        assert words in done.stdout
    assert re.search(r"21 days of the cluster +21.0 +258,048 +534,701", done.stdout)

    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["model"]["parameters"] == 456_089_655_296
    assert numbers["model"]["lightning_state_bytes"] == 280 * 2**20
    assert numbers["days_price"]["gpu_hours"] == 258_048
    layouts = numbers["layouts"]
    assert len(layouts) > 3
    assert {(layout["fits"], layout["configured"]) for layout in layouts} == {(True, False)}
    assert layouts[0]["step_seconds"]["total"] <= layouts[-1]["step_seconds"]["total"]
    assert f"{layouts[0]['step_seconds']['total']:.2f}" in done.stdout
    assert (tmp_path / "plan.png").stat().st_size > 20_000


def test_no_torch_is_needed() -> None:
    code = "import sys, tools.plan; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("plan.nodse=3", "unknown key plan.nodse: did you mean plan.nodes?"),
        ("plan.nodes=0", "plan.nodes=0 must be positive"),
        ("plan=h900", "plan=h900 is not one of h100, h200, h800"),
        ("nodes", "nodes is not of the form KEY=VALUE"),
    ],
)
def test_a_wrong_argument_is_one_sentence(argument: str, sentence: str) -> None:
    done = plan(argument)
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert done.stderr == f"error: {sentence}\n"


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    done = plan(*FEW, "--json", f"{tmp_path}/none/plan.json")
    assert done.returncode == EXIT_INPUT
    assert done.stderr == (
        f"error: {tmp_path}/none/plan.json cannot be written: No such file or directory\n"
    )


def test_a_cluster_that_is_too_small_is_said(tmp_path: Path) -> None:
    done = plan("plan.nodes=4", *FEW)
    assert done.returncode == 0
    assert re.search(
        r"# 0 of \d+ combinations fit; the smallest needs \d+.\d GiB: give more nodes", done.stdout
    )
    assert "# price" not in done.stdout
    json_file = ["--json", f"{tmp_path}/plan.json"]
    fixed = plan("plan.nodes=8", "plan.search.enabled=false", "parallel=h800_m1", *json_file)
    assert "# the layout that is configured does not fit" in fixed.stdout
    (layout,) = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert (layout["fits"], layout["configured"]) == (False, True)


def test_who_stops_reading_sees_no_traceback() -> None:
    shell = f"{sys.executable} tools/plan.py {shlex.join(FEW)} | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("# model\n", "")


def test_help_has_an_example_and_explains_every_option() -> None:
    told = " ".join(plan("--help").stdout.split())
    assert "python tools/plan.py model=m1_456b" in told
    for words in ("model=m1_1b, plan.nodes=4", "write every number", "draw what length costs"):
        assert words in told


def keys(schema: Any, prefix: str) -> list[str]:
    found = []
    for item in fields(schema):
        value = getattr(schema, item.name)
        name = f"{prefix}.{item.name}"
        found += keys(value, name) if is_dataclass(value) else [name]
    return found


def test_every_key_is_on_the_page() -> None:
    named = CODE.findall(section("planning.md", "Keys"))
    assert sorted(name for name in named if name.startswith("plan.")) == sorted(
        keys(Plan(), "plan")
    )


COMMANDS = [
    [word for word in command[2:] if "=" in word]
    for command in commands(PAGE)
    if "tools/plan.py" in command
]


@pytest.mark.parametrize("overrides", COMMANDS, ids=" ".join)
def test_the_pages_commands_find_layouts(overrides: list[str]) -> None:
    few = [] if "plan.search.enabled=false" in overrides else FEW
    if "model=m1_1b" in overrides:
        few = ["plan.search.tp=[1]", "plan.search.pp=[1]"]
    assert search(load("plan", PlanConfig, [*overrides, *few]).with_plan_applied()).found


def test_the_search_is_short_and_reads_the_same_both_times() -> None:
    first, second = (search(load("plan", PlanConfig, FEW)) for _ in range(2))
    assert [each.overrides() for each in first.found] == [each.overrides() for each in second.found]
