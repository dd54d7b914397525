"""Runs in the sandbox, by itself: unpacks a repository, applies patches, and runs its tests.

Reads one JSON object from standard input. Prints lines that begin with the nonce: first what came
of the patch, then a line a test. Nothing of the patch runs before the first line is out, and what
tests print goes nowhere.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]

# How git says that a path leads out of the tree.
_OUTSIDE = ("invalid path", "beyond a symbolic link", "is outside")


class Refused(Exception):
    """The patch may not be applied."""


def main() -> None:
    request = json.load(sys.stdin)
    out = os.dup(1)

    def say(**values: Any) -> None:
        os.write(out, f"{request['nonce']} {json.dumps(values)}\n".encode())

    # Before the repository could put something of the same name in its place.
    importlib.import_module(request["runner"])
    repository = unpack(Path("input/snapshot.tar"), Path("repository"))
    try:
        apply_guarded(request["patch"], repository, request["protected"])
    except Refused as refusal:
        say(refused=str(refusal))
        return
    except subprocess.CalledProcessError as error:
        say(rejected=error.stderr.decode(errors="replace")[-2000:])
        return
    if request["test_patch"]:
        apply(request["test_patch"], repository)
    say(applied=True)
    test(repository, request["runner"], request["tests"], say)


def unpack(archive: Path, folder: Path) -> Path:
    """The top of the repository: the only folder of the archive, or all of it."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **safe)
    entries = list(folder.iterdir())
    return (entries[0] if len(entries) == 1 and entries[0].is_dir() else folder).resolve()


def apply_guarded(patch: str, repository: Path, protected: list[str]) -> None:
    """Apply a patch that leaves protected files as they are, makes no links and stays inside."""
    before = guarded(repository, protected)
    try:
        apply(patch, repository)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace")
        if any(words in said for words in _OUTSIDE):
            raise Refused(said) from error
        raise
    after = guarded(repository, protected)
    touched = sorted(dict(before.items() ^ after.items()))
    if touched:
        raise Refused(f"it touches {', '.join(touched[:10])}")


def guarded(repository: Path, protected: list[str]) -> dict[str, str]:
    """What must not change, by path: protected files, and every link's target."""
    found = {}
    for folder, folders, files in os.walk(repository):
        for name in (*folders, *files):
            path = Path(folder, name)
            inside = path.relative_to(repository).as_posix()
            if path.is_symlink():
                found[inside] = os.readlink(path)
            elif path.is_file() and any(
                fnmatch.fnmatchcase(part, pattern)
                for pattern in protected
                for part in (inside, name)
            ):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[inside] = f"{path.stat().st_mode:o} {content}"
    return found


def apply(patch: str, repository: Path) -> None:
    subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        input=patch.encode(),
        cwd=repository,
        capture_output=True,
        check=True,
    )


def test(repository: Path, runner: str, tests: list[str], say: Say) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(repository)
    sys.path.insert(0, str(repository))
    {"pytest": run_pytest, "unittest": run_unittest}[runner](tests, say)


def run_pytest(tests: list[str], say: Say) -> None:
    """Run the files of the tests; one that cannot be imported does not keep others from running."""
    import pytest

    class Recorder:
        def __init__(self) -> None:
            self.phases: dict[str, list[bool]] = {}

        def pytest_runtest_logreport(self, report: Any) -> None:
            phases = self.phases.setdefault(report.nodeid, [])
            if report.when == "call" or not report.passed:
                phases.append(report.passed and not hasattr(report, "wasxfail"))
            if report.when == "teardown":
                say(test=report.nodeid, passed=bool(phases) and all(phases))

    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    present = [name for name in files if os.path.exists(name)]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, "--rootdir", os.getcwd(), *present], plugins=[Recorder()])


def run_unittest(tests: list[str], say: Say) -> None:
    import unittest

    class Recorder(unittest.TestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:
            say(test=test.id(), passed=True)

    unittest.defaultTestLoader.loadTestsFromNames(tests).run(Recorder())


if __name__ == "__main__":
    main()
