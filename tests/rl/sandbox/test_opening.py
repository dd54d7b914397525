"""What is said where a sandbox cannot be had."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from megatron_m1.rl.sandbox.config import Limits, SandboxConfig
from megatron_m1.rl.sandbox.interpreter import find_python, folders_of
from megatron_m1.rl.sandbox.outcome import SandboxFailed, SandboxUnavailable
from megatron_m1.rl.sandbox.rlimits import RLimits
from megatron_m1.rl.sandbox.sandbox import open_sandbox


def path_with(folder: Path, monkeypatch: pytest.MonkeyPatch, bwrap: str | None) -> None:
    """A PATH on which there is this bwrap, or none, and the other programs that are needed."""
    for name in ("prlimit", "setpriv", "sh"):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    if bwrap is not None:
        (folder / "bwrap").write_text(bwrap)
        (folder / "bwrap").chmod(0o755)
    folder.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_no_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_with(tmp_path, monkeypatch, bwrap=None)
    with pytest.raises(SandboxUnavailable, match="needs the program bwrap: install") as raised:
        open_sandbox(SandboxConfig())
    assert "reward.sandbox.kind=rlimits" in str(raised.value)


def test_no_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        said = "bwrap: setting up uid map: Permission denied"
        path_with(Path(folder), monkeypatch, f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        with pytest.raises(SandboxUnavailable) as raised:
            open_sandbox(SandboxConfig())
    assert said in str(raised.value)
    assert "allow user namespaces" in str(raised.value)
    assert "reward.sandbox.kind=rlimits" in str(raised.value)


def test_a_bubblewrap_that_dies_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path_with(Path(folder), monkeypatch, "#!/bin/sh\nkill -9 $$\n")
        with pytest.raises(SandboxUnavailable, match="did not run a program: it ended without"):
            open_sandbox(SandboxConfig())


def test_no_fallback_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_with(tmp_path, monkeypatch, bwrap=None)
    with pytest.raises(SandboxUnavailable):
        open_sandbox(SandboxConfig())
    assert isinstance(open_sandbox(SandboxConfig(kind="rlimits")), RLimits)


def test_an_unknown_kind() -> None:
    with pytest.raises(SandboxUnavailable, match="=docker is not one of bubblewrap, rlimits"):
        open_sandbox(SandboxConfig(kind="docker"))


@pytest.mark.parametrize("python", ["python3", "/no/such/python"])
def test_an_interpreter_that_is_not_there(python: str) -> None:
    with pytest.raises(SandboxUnavailable, match=f"python={python} is not the absolute path"):
        open_sandbox(SandboxConfig(kind="rlimits", python=python))


def test_an_interpreter_that_does_not_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no >&2\nexit 3\n")
    with pytest.raises(SandboxUnavailable, match="give an interpreter that every user may read"):
        open_sandbox(SandboxConfig(kind="rlimits", python=str(broken)))


def test_a_command_that_does_not_exist() -> None:
    outcome = RLimits(SandboxConfig()).run(["/no/such/program"], Limits())
    assert outcome.status == 125
    assert b"/no/such/program" in outcome.stderr


def test_a_supervisor_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SandboxFailed, match="supervisor of a program did not come back"):
        RLimits(SandboxConfig()).run(["/bin/true"], Limits())


def test_folders_of_a_virtual_environment(tmp_path: Path) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    for folder in (base, own):
        (folder / "bin").mkdir(parents=True)
    (base / "bin" / "python3").touch()
    (own / "bin" / "python3").symlink_to(base / "bin" / "python3")
    (own / "pyvenv.cfg").write_text(f"home = {base}/bin\nversion = 3.11\n")
    assert folders_of(str(own / "bin" / "python3")) == [str(base), str(own)]
    assert folders_of("/usr/bin/python3") == []


def test_the_default_interpreter_runs_here() -> None:
    assert Path(find_python(None)).is_file()


def test_limits_must_be_positive() -> None:
    found = list(Limits(seconds=0, processes=-1).problems("reward.code.limits"))
    assert found == [
        "reward.code.limits.seconds=0 must be positive",
        "reward.code.limits.processes=-1 must be positive",
    ]
