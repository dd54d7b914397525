"""Patches judged by the tests of the repository that they are for, in the sandbox."""

from __future__ import annotations

import json
import secrets
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_m1.rl.rewards.answers import after_thoughts, last_fenced
from megatron_m1.rl.rewards.config import SoftwareConfig
from megatron_m1.rl.rewards.verdict import VerifierFailed
from megatron_m1.rl.sandbox.sandbox import Sandbox

_HARNESS = Path(__file__).with_name("software_harness.py")
_RUNNERS = ("pytest", "unittest")
_STARTS = ("diff --git ", "--- ")


@dataclass(frozen=True)
class Issue:
    """What is to be mended.

    Attributes:
        snapshot: the repository before: a folder, or a tar archive.
        fail_to_pass: tests that a right patch makes pass.
        pass_to_pass: tests that must still pass.
        test_patch: a diff with tests that the repository does not have yet.
        runner: pytest or unittest, whose names of tests are given.
    """

    snapshot: Path
    fail_to_pass: list[str]
    pass_to_pass: list[str]
    test_patch: str = ""
    runner: str = "pytest"

    @property
    def tests(self) -> list[str]:
        return [*self.fail_to_pass, *self.pass_to_pass]


def read_issue(ground_truth: Any) -> Issue:
    """An issue from a dictionary or its JSON; SWE-bench's names in capitals are read too.

    Raises:
        VerifierFailed: something is missing.
    """
    try:
        given = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
        issue = Issue(
            snapshot=Path(given["snapshot"]),
            fail_to_pass=_names(given, "fail_to_pass"),
            pass_to_pass=_names(given, "pass_to_pass"),
            test_patch=given.get("test_patch") or "",
            runner=given.get("runner", "pytest"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VerifierFailed(f"the ground truth is no issue with tests: {error!r}") from error
    if not issue.fail_to_pass or issue.runner not in _RUNNERS:
        raise VerifierFailed("an issue needs fail_to_pass and a runner, pytest or unittest")
    return issue


def _names(given: Mapping[str, Any], key: str) -> list[str]:
    value = given.get(key, given.get(key.upper(), []))
    return list(json.loads(value) if isinstance(value, str) else value)


class SoftwareVerifier:
    """Applies the diff of a response to a snapshot and runs the tests of both lists.

    1 where all pass, else the configured failure. Beside it: ``applied``, ``refused`` (it touches
    tests, or leaves the tree), and the shares ``fail_to_pass`` and ``pass_to_pass``.
    """

    def __init__(self, config: SoftwareConfig, sandbox: Sandbox) -> None:
        self._config, self._sandbox = config, sandbox

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        issue = read_issue(ground_truth)
        patch = patch_in(solution_str)
        reports = self._run(issue, patch) if patch else [{}]
        passed = {report["test"] for report in reports if report.get("passed")}
        mended, kept = (
            sum(test in passed for test in tests) / max(len(tests), 1)
            for tests in (issue.fail_to_pass, issue.pass_to_pass)
        )
        is_solved = passed.issuperset(issue.tests)
        return {
            "score": 1.0 if is_solved else self._config.failure,
            "format": float(bool(patch)),
            "applied": float("applied" in reports[0]),
            "refused": float("refused" in reports[0]),
            "fail_to_pass": mended,
            "pass_to_pass": kept if issue.pass_to_pass else 1.0,
        }

    def _run(self, issue: Issue, patch: str) -> list[dict[str, Any]]:
        nonce = secrets.token_hex(16)
        request = {
            "nonce": nonce,
            "patch": patch,
            "test_patch": issue.test_patch,
            "protected": [*self._config.protected, *_files_of(issue)],
            "tests": issue.tests,
            "runner": issue.runner,
        }
        with _archive(issue.snapshot) as archive:
            outcome = self._sandbox.run(
                [self._sandbox.python, "-I", "-B", "input/harness.py"],
                self._config.limits,
                files={"harness.py": _HARNESS.read_bytes(), "snapshot.tar": archive},
                stdin=json.dumps(request).encode(),
            )
        reports = _reports(outcome.stdout.decode(errors="replace"), nonce)
        if not reports:
            said = outcome.stderr.decode(errors="replace")[-2000:] or outcome.stopped
            raise VerifierFailed(f"the repository {issue.snapshot} cannot be tested: {said}")
        return reports


def patch_in(response: str) -> str | None:
    """The last fenced diff of a response, or all from where an unfenced one begins."""
    fenced = last_fenced(response, ("diff", "patch"))
    if fenced is not None:
        return fenced if any(start in fenced for start in _STARTS) else None
    lines = after_thoughts(response).splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith(_STARTS):
            return "".join(lines[number:]).rstrip("\n") + "\n"
    return None


def _files_of(issue: Issue) -> Iterator[str]:
    """Files of the tests, which a patch may not touch."""
    for test in issue.tests:
        if issue.runner == "pytest":
            yield test.partition("::")[0]
        else:
            yield "/".join(test.split(".")[:-2]) + ".py"
    for line in issue.test_patch.splitlines():
        if line.startswith(("--- a/", "+++ b/")):
            yield line[6:].partition("\t")[0]


@contextmanager
def _archive(snapshot: Path) -> Iterator[BinaryIO]:
    """The snapshot as a tar archive, open at its beginning."""
    with ExitStack() as stack:
        file: BinaryIO
        try:
            if snapshot.is_file():
                file = stack.enter_context(snapshot.open("rb"))
            else:
                file = stack.enter_context(tempfile.TemporaryFile())
                _pack(snapshot, file)
        except (OSError, tarfile.TarError) as error:
            raise VerifierFailed(f"the snapshot {snapshot} cannot be read: {error}") from error
        yield file


def _pack(folder: Path, file: BinaryIO) -> None:
    entries = sorted(folder.iterdir())
    with tarfile.open(fileobj=file, mode="w") as tar:
        for entry in entries:
            tar.add(entry, f"repository/{entry.name}")
    file.seek(0)


def _reports(printed: str, nonce: str) -> list[dict[str, Any]]:
    """What the harness said, a dictionary a line that begins with the nonce."""
    found = []
    for line in printed.splitlines():
        first, _, rest = line.partition(" ")
        if first == nonce:
            try:
                found.append(json.loads(rest))
            except ValueError:
                continue
    return found
