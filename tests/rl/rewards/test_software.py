"""Patches judged by the tests of a small repository."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.rl.rewards.config import SoftwareConfig
from megatron_m1.rl.rewards.software import SoftwareVerifier, patch_in
from megatron_m1.rl.rewards.verdict import VerifierFailed
from megatron_m1.rl.sandbox.config import Limits, SandboxConfig
from megatron_m1.rl.sandbox.outcome import SandboxUnavailable
from megatron_m1.rl.sandbox.sandbox import Sandbox, open_sandbox

FILES = {
    "calc/__init__.py": "",
    "calc/numbers.py": "def half(n):\n    return n // 2\n\n\ndef double(n):\n    return n * 2\n",
    "tests/__init__.py": "",
    "tests/test_numbers.py": (
        "import unittest\nfrom calc import numbers\n\n\n"
        "class Numbers(unittest.TestCase):\n"
        "    def test_half(self):\n        self.assertEqual(numbers.half(3), 1.5)\n\n"
        "    def test_double(self):\n        self.assertEqual(numbers.double(3), 6)\n"
    ),
    "readme.txt": "A calculator.\n",
}
BROKEN, RIGHT = FILES["calc/numbers.py"], FILES["calc/numbers.py"].replace("//", "/")
ISSUE = {
    "fail_to_pass": ["tests.test_numbers.Numbers.test_half"],
    "pass_to_pass": ["tests.test_numbers.Numbers.test_double"],
    "runner": "unittest",
}
PYTEST_ISSUE = {
    "FAIL_TO_PASS": json.dumps(["tests/test_numbers.py::Numbers::test_half"]),
    "PASS_TO_PASS": json.dumps(["tests/test_numbers.py::Numbers::test_double"]),
}
LIMITS = Limits(seconds=20.0, memory_mb=512, processes=16, files_mb=32)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "repository"


def diff(path: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    return "".join(lines)


def new_file(path: str, text: str, mode: str = "100644") -> str:
    head = f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
    lines = text.splitlines(keepends=True)
    return f"{head}@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}" for line in lines)


FIX = diff("calc/numbers.py", BROKEN, RIGHT)


def judge(sandbox: Sandbox, snapshot: Path, patch: str, **issue: Any) -> dict[str, float]:
    verifier = SoftwareVerifier(SoftwareConfig(failure=-1.0, limits=LIMITS), sandbox)
    response = f"Looking at it...</think>The fix:\n```diff\n{patch}```\n"
    return verifier("swe", response, {"snapshot": str(snapshot), **ISSUE, **issue})


def test_a_right_patch(sandbox: Sandbox, snapshot: Path) -> None:
    assert judge(sandbox, snapshot, FIX) == {
        **{"score": 1.0, "format": 1.0, "applied": 1.0, "refused": 0.0},
        **{"fail_to_pass": 1.0, "pass_to_pass": 1.0},
    }
    assert (snapshot / "calc/numbers.py").read_text() == BROKEN


def test_an_archive_as_snapshot(sandbox: Sandbox, snapshot: Path) -> None:
    archive = snapshot.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(snapshot, "calc-1.0")
    assert judge(sandbox, archive, FIX)["score"] == 1.0


def test_a_regression(sandbox: Sandbox, snapshot: Path) -> None:
    patch = diff("calc/numbers.py", BROKEN, RIGHT.replace("n * 2", "n * 3"))
    found = judge(sandbox, snapshot, patch)
    assert (found["score"], found["fail_to_pass"], found["pass_to_pass"]) == (-1.0, 1.0, 0.0)


def test_a_patch_that_mends_nothing(sandbox: Sandbox, snapshot: Path) -> None:
    found = judge(sandbox, snapshot, diff("readme.txt", "A calculator.\n", "Mine.\n"))
    assert (found["score"], found["fail_to_pass"], found["pass_to_pass"]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "program",
    ["raise RuntimeError\n", "def half(:\n", "import os; os._exit(0)\n", "while True: pass\n"],
)
def test_a_patch_whose_code_does_not_run(sandbox: Sandbox, snapshot: Path, program: str) -> None:
    verifier = SoftwareVerifier(SoftwareConfig(limits=Limits(seconds=2.0)), sandbox)
    patch = diff("calc/numbers.py", BROKEN, program)
    found = verifier("swe", patch, {"snapshot": str(snapshot), **ISSUE})
    assert (found["score"], found["applied"], found["pass_to_pass"]) == (0.0, 1.0, 0.0)


def test_a_patch_that_does_not_apply(sandbox: Sandbox, snapshot: Path) -> None:
    patch = diff("calc/numbers.py", "def third(n):\n    return 0\n", "def third(n):\n    pass\n")
    found = judge(sandbox, snapshot, patch)
    assert (found["score"], found["applied"], found["refused"]) == (-1.0, 0.0, 0.0)


TESTS = FILES["tests/test_numbers.py"]
REFUSED = {
    "changes a test": diff("tests/test_numbers.py", TESTS, TESTS.replace("1.5", "1")),
    "removes a test": (
        "diff --git a/tests/test_numbers.py b/tests/test_numbers.py\ndeleted file mode 100644\n"
        + diff("tests/test_numbers.py", TESTS, "").replace(
            "+++ b/tests/test_numbers.py", "+++ /dev/null"
        )
    ),
    "renames a test": (
        "diff --git a/tests/test_numbers.py b/calc/other.py\nsimilarity index 100%\n"
        "rename from tests/test_numbers.py\nrename to calc/other.py\n"
    ),
    "adds a configuration of tests": new_file("conftest.py", "collect_ignore = ['tests']\n"),
    "adds one below": new_file("calc/conftest.py", "x = 1\n"),
    "adds an option": new_file("pytest.ini", "[pytest]\naddopts = -p calc.plugin\n"),
    "adds a hidden option": new_file(".pytest.ini", "[pytest]\naddopts = -p calc.plugin\n"),
    "makes a test an executable file": (
        "diff --git a/tests/test_numbers.py b/tests/test_numbers.py\n"
        "old mode 100644\nnew mode 100755\n"
    ),
    "makes a link out of the tree": new_file("link", "/etc/passwd", "120000"),
    "writes through a link": new_file("link", "/tmp", "120000") + new_file("link/x.py", "x = 1\n"),
    "leaves the tree": new_file("../outside.py", "x = 1\n"),
    "names a path from the root": new_file("/tmp/outside.py", "x = 1\n"),
    "writes to git's own folder": new_file(".git/hooks/post-applypatch", "exit 0\n"),
}


@pytest.mark.parametrize("patch", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(sandbox: Sandbox, snapshot: Path, patch: str) -> None:
    found = judge(sandbox, snapshot, FIX + patch)
    assert (found["score"], found["refused"], found["applied"]) == (-1.0, 1.0, 0.0)


def test_tests_that_come_with_the_issue(sandbox: Sandbox, snapshot: Path) -> None:
    added = (
        "import unittest\nfrom calc import numbers\n\n\nclass More(unittest.TestCase):\n"
        "    def test_one(self):\n        self.assertEqual(numbers.half(1), 0.5)\n"
    )
    issue = {
        "test_patch": new_file("more/test_more.py", added) + new_file("more/__init__.py", "\n"),
        "fail_to_pass": ["more.test_more.More.test_one"],
    }
    assert judge(sandbox, snapshot, FIX, **issue)["score"] == 1.0
    wrong = diff("calc/numbers.py", BROKEN, RIGHT.replace("n / 2", "n"))
    assert judge(sandbox, snapshot, wrong, **issue)["score"] == -1.0
    early = FIX + new_file("more/__init__.py", "x = 1\n")
    assert judge(sandbox, snapshot, early, **issue)["refused"] == 1.0


@pytest.mark.parametrize(
    ("response", "patch"),
    [
        ("```diff\n--- a/x\n+++ b/x\n```", "--- a/x\n+++ b/x\n"),
        ("```patch\n--- a/x\n```", "--- a/x\n"),
        ("so\ndiff --git a/x b/x\n+1", "diff --git a/x b/x\n+1\n"),
        ("--- a/x</think>none", None),
        ("```diff\nno patch\n```", None),
        ("", None),
    ],
)
def test_the_patch_in_a_response(response: str, patch: str | None) -> None:
    assert patch_in(response) == patch


def test_no_patch(sandbox: Sandbox, snapshot: Path) -> None:
    found = SoftwareVerifier(SoftwareConfig(), sandbox)(
        "swe", "I give up", {"snapshot": str(snapshot), **ISSUE}
    )
    assert (found["score"], found["format"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fail_to_pass": []}, "needs fail_to_pass"),
        ({"fail_to_pass": "not json"}, "is no issue with tests"),
        ({"runner": "nose"}, "a runner, pytest or unittest"),
        ({"test_patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n"}, "cannot be tested"),
    ],
)
def test_an_issue_that_cannot_be_judged(
    sandbox: Sandbox, snapshot: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(VerifierFailed, match=said):
        judge(sandbox, snapshot, FIX, **changes)


def test_a_snapshot_that_is_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(VerifierFailed, match="the snapshot .*nowhere cannot be read"):
        judge(sandbox, tmp_path / "nowhere", FIX)


def test_a_repository_that_is_larger_than_it_may_be(sandbox: Sandbox, snapshot: Path) -> None:
    (snapshot / "large").write_bytes(os.urandom(4 << 20))
    verifier = SoftwareVerifier(SoftwareConfig(limits=Limits(files_mb=2)), sandbox)
    with pytest.raises(VerifierFailed, match="cannot be tested"):
        verifier("swe", FIX, {"snapshot": str(snapshot), **ISSUE})


@pytest.fixture(scope="module")
def with_pytest(sandbox_config: SandboxConfig) -> Iterator[Sandbox]:
    """A sandbox whose interpreter has pytest: a virtual environment of the system's."""
    system = Path("/usr/bin/python3")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        if not system.exists() or not system.resolve().name.startswith(version):
            pytest.skip(f"{system} is not {version}, for which pytest is installed")
        packages = Path(folder, "lib", version, "site-packages")
        Path(folder, "bin").mkdir()
        Path(folder, "bin", "python3").symlink_to(system)
        Path(folder, "pyvenv.cfg").write_text("home = /usr/bin\n")
        for name in ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"):
            module = __import__(name)
            shutil.copytree(Path(module.__file__ or "").parent, packages / name)
        shutil.copy(__import__("py").__file__, packages)
        config = SandboxConfig(sandbox_config.kind, python=f"{folder}/bin/python3")
        try:
            yield open_sandbox(config)
        except SandboxUnavailable as error:
            pytest.skip(str(error))


def test_pytest_as_runner(with_pytest: Sandbox, snapshot: Path) -> None:
    issue = {"runner": "pytest", **PYTEST_ISSUE}
    verifier = SoftwareVerifier(SoftwareConfig(limits=LIMITS), with_pytest)
    truth = {"snapshot": str(snapshot), **issue}
    assert verifier("swe", FIX, truth)["score"] == 1.0
    assert verifier("swe", FIX + REFUSED["changes a test"], truth)["refused"] == 1.0
    wrong = verifier("swe", diff("calc/numbers.py", BROKEN, RIGHT.replace("* 2", "* 3")), truth)
    assert (wrong["score"], wrong["fail_to_pass"], wrong["pass_to_pass"]) == (0.0, 1.0, 0.0)


def test_pytest_that_the_patch_brings_along(with_pytest: Sandbox, snapshot: Path) -> None:
    """Its own pytest and sitecustomize are not the ones that judge."""
    fake = new_file("pytest.py", "import os\nos._exit(0)\n")
    fake += new_file("sitecustomize.py", "import os\nos._exit(0)\n")
    verifier = SoftwareVerifier(SoftwareConfig(limits=LIMITS), with_pytest)
    truth = {"snapshot": str(snapshot), "runner": "pytest", **PYTEST_ISSUE}
    assert verifier("swe", FIX + fake, truth)["score"] == 1.0
    assert verifier("swe", fake, truth)["score"] == 0.0


def test_an_interpreter_without_the_runner(sandbox: Sandbox, snapshot: Path) -> None:
    if shutil.which("pytest", path="/usr/bin"):
        pytest.skip("the system's python has pytest")
    with pytest.raises(VerifierFailed, match="No module named 'pytest'"):
        judge(sandbox, snapshot, FIX, **{**PYTEST_ISSUE, "runner": "pytest"})
