"""What the pages say against what is there: paths, commands, keys, metrics."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.attribution.config import MismatchConfig
from megatron_m1.checkpoint.mapping import MINIMAX
from megatron_m1.config import (
    BatchPhase,
    CommonConfig,
    GenerateConfig,
    LrPhase,
    RunConfig,
    ScoreConfig,
    ServeConfig,
)
from megatron_m1.config_checks import run_problems
from megatron_m1.config_loading import load
from megatron_m1.rl.config import LatePhase, RLConfig, TaskConfig
from megatron_m1.rl.config_checks import rl_problems
from megatron_m1.rl.rewards.config import VerifierConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(page for page in sorted(ROOT.glob("*.md")))]
PROGRAMS = {
    "pretrain": RunConfig,
    "train_rl": RLConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "serve": ServeConfig,
}
CONFIGURED = {**PROGRAMS, "mismatch": MismatchConfig}

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
METRIC = re.compile(
    r"(train|val|optim|perf|time|moe|actor|critic|cispo|response_length|rollout|rollout_corr"
    r"|training|reward|timing_s)(/[a-z0-9_]+)+"
)
MADE_BY_RUNS = ("runs", "data", "RUN_DIR")
BANNED = {
    "unfinished": re.compile(r"\b(TODO|FIXME|XXX|TBD)\b"),
    "a path of one machine": re.compile(
        r"(?<![\w.>/])/(tmp|home|root|mnt|opt|usr|var|srv|Users)\b"
    ),
    "an address of packages": re.compile(r"index-url"),
}

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@page_by_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@page_by_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    named = [span for span in CODE.findall(prose(page)) if is_repository_path(span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def is_repository_path(text: str) -> bool:
    """Whether a code span names a file or folder from the root, made by nobody at run time."""
    if not PATH.fullmatch(text) or text.split("/")[0] in MADE_BY_RUNS:
        return False
    in_folder = "/" in text and (ROOT / text.split("/")[0]).is_dir()
    return in_folder or ("/" in text and text.endswith((".py", ".yaml", ".md", ".toml")))


@page_by_page
def test_nothing_banned(page: Path) -> None:
    found = {what: banned.findall(page.read_text()) for what, banned in BANNED.items()}
    assert {what: words for what, words in found.items() if words} == {}


def test_index_lists_every_page() -> None:
    listed = LINK.findall((ROOT / "docs/index.md").read_text())
    assert sorted(listed) == [page.name for page in DOCS if page.name != "index.md"]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of a page, one a line of its bash blocks or a code span."""
    for language, block in FENCE.findall(page.read_text()):
        if language in ("bash", "sh", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if "-m " in line or "tools/" in line or line.startswith("make"):
                    yield shlex.split(line, comments=True)
    for span in CODE.findall(prose(page)):
        if span.startswith("python "):
            yield shlex.split(span)


ALL_COMMANDS = [
    pytest.param(command, id=f"{page.name}: {' '.join(command)[:60]}")
    for page in PAGES
    for command in commands(page)
]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_command_is_understood(command: list[str]) -> None:
    programs = [word for word in command if word.startswith("megatron_m1.")]
    tools = [word for word in command if word.startswith("tools/")]
    if programs:
        name = programs[0].removeprefix("megatron_m1.")
        given = command[command.index(programs[0]) + 1 :]
        config = load(name, PROGRAMS[name], [word for word in given if not word.startswith("-")])
        if isinstance(config, RunConfig):
            assert run_problems(config, started_processes(command, config)) == []
        if isinstance(config, RLConfig):
            assert rl_problems(config, started_processes(command, config)) == []
    elif tools:
        source = (ROOT / tools[0]).read_text()
        # What stands before the tool is a launcher's, and behind a bare -- another program's.
        given = command[command.index(tools[0]) + 1 :]
        given = given[: given.index("--")] if "--" in given else given
        flags = [word for word in given if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in source] == []
    elif command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


PYTHON_BLOCKS = [
    pytest.param(block, id=f"{page.name} {number}")
    for page in PAGES
    for number, (language, block) in enumerate(FENCE.findall(page.read_text()))
    if language == "python"
]


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_runs(block: str) -> None:
    exec(compile(block, "example", "exec"), {})


def started_processes(command: list[str], config: CommonConfig) -> int:
    """How many processes a command trains on, or stands for in a dry run."""
    if "--nproc-per-node" in command:
        return int(command[command.index("--nproc-per-node") + 1])
    return config.world_size or (config.parallel.smallest_world if config.dry_run else 1)


def test_the_pages_show_every_program() -> None:
    shown = {word for page in DOCS for command in commands(page) for word in command}
    assert {f"megatron_m1.{name}" for name in PROGRAMS} <= shown


def section(page: str, title: str) -> str:
    """The text below a heading of the second level."""
    parts = re.split(r"^## (.*)\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows that start with a code span."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in cells]


def defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its default."""
    found: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            found |= defaults(value, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = value
    return found


def as_written(value: Any) -> str:
    """A default as a user types it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, dict):
        return str(value)
    if isinstance(value, float):
        return str(value) if value == 0 or abs(value) >= 1e-3 else f"{value:g}".replace("e-0", "e-")
    return str(value) or '""'


@pytest.mark.parametrize("program", CONFIGURED)
def test_every_key_is_on_the_page_with_its_default(program: str) -> None:
    expected = defaults(CONFIGURED[program]())
    if program == "pretrain":
        expected |= defaults(LrPhase(), "optim.phases.")
        expected |= defaults(BatchPhase(), "train.batch_phases.")
    elif program == "train_rl":
        shared = defaults(CommonConfig())
        expected = {key: value for key, value in expected.items() if key not in shared}
        expected |= defaults(TaskConfig(), "data.tasks.")
        expected |= defaults(LatePhase(), "rl.late.")
        expected |= defaults(VerifierConfig(), "reward.verifiers.")
    else:
        expected = {k: v for k, v in expected.items() if not k.startswith("parallel.")}
    table = rows(section("configuration.md", f"Keys of `{program}`"))
    keys = [key.strip("`") for key, *_ in table]
    assert sorted(keys) == sorted(expected)
    found = {key.strip("`"): default.strip("`") for key, default, _ in table}
    assert found == {key: as_written(value) for key, value in expected.items()}
    assert all(meaning for *_, meaning in table)


def test_every_group_and_option_is_on_the_page() -> None:
    table = rows((ROOT / "docs/configuration.md").read_text().split("## Rules")[0])
    found = {group.strip("`"): set(CODE.findall(options)) for group, options in table}
    assert found == {
        folder.name: {file.stem for file in folder.glob("*.yaml")}
        for folder in (ROOT / "conf").iterdir()
        if folder.is_dir()
    }


def written_names() -> tuple[set[str], set[str]]:
    """Metrics and texts that training writes: keys of dictionaries and of assignments in its code,
    and the names given to ``sinks.text``."""
    metrics, texts = set(), set()
    folders = (ROOT / "megatron_m1/training", ROOT / "megatron_m1/rl")
    for file in [file for folder in folders for file in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                keys: list[ast.expr | None] = list(node.keys)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            else:
                keys = []
            metrics |= {key.value for key in keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sinks.text"):
                texts |= {ast.literal_eval(node.args[1])}
    return {name for name in metrics if METRIC.fullmatch(str(name))}, texts


def test_metrics_are_those_that_training_writes() -> None:
    metrics, texts = written_names()
    page = (ROOT / "docs/metrics.md").read_text()
    titles = ("Every step", "Evaluations", "Reinforcement learning")
    tables = "".join(section("metrics.md", title) for title in titles)
    assert sorted(name.strip("`") for name, *_ in rows(tables)) == sorted(metrics)
    assert {name.strip("`") for name, _ in rows(section("metrics.md", "Texts"))} == texts
    assert {span for span in CODE.findall(page) if METRIC.fullmatch(span)} <= metrics


def test_names_of_the_checkpoint_mapping() -> None:
    table = rows((ROOT / "docs/checkpoints.md").read_text().split("## Names")[1])
    shown = [(CODE.findall(ours)[0], *CODE.findall(theirs)) for ours, theirs, *_ in table]
    prefixes = ("decoder.layers.{layer}.", "model.layers.{layer}.")
    expected = [
        tuple(
            name.removeprefix(prefixes[0]).removeprefix(prefixes[1])
            for name in (rule.ours, *(theirs for theirs, _ in rule.theirs))
        )
        for rule in MINIMAX
    ]
    assert sorted(shown) == sorted(expected)
