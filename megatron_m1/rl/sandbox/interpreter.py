"""The interpreter of programs, and the folders that it needs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatron_m1.rl.sandbox.outcome import SandboxUnavailable

SYSTEM = "/usr"
NOBODY = 65534
"""The user that programs run as, where this process may choose."""


def find_python(configured: str | None) -> str:
    """The path of the interpreter: the configured one, the system's, or the one that runs here."""
    if configured is None:
        found = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
        return found or str(Path(sys.executable).resolve())
    if not Path(configured).is_absolute() or not Path(configured).is_file():
        raise SandboxUnavailable(
            f"reward.sandbox.python={configured} is not the absolute path of an interpreter"
        )
    return configured


def folders_of(python: str) -> list[str]:
    """The folders beyond the system's that an interpreter is made of: its installation, and where
    it belongs to a virtual environment, that."""
    found = [Path(python).parent.parent, Path(python).resolve().parent.parent]
    settings = found[0] / "pyvenv.cfg"
    if settings.is_file():
        found += [
            Path(line.partition("=")[2].strip()).parent
            for line in settings.read_text().splitlines()
            if line.partition("=")[0].strip() == "home"
        ]
    return sorted({str(folder) for folder in found if not folder.is_relative_to(SYSTEM)} - {"/"})
