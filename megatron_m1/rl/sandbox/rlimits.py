"""Programs within resource limits, and nothing more: they see this machine's files and network,
and where this process is not root, they are the same user and may end it. For machines that cannot
start a sandbox and programs that are trusted; it is used only where a configuration names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_m1.rl.sandbox.attending import Attendant, Attended
from megatron_m1.rl.sandbox.bubblewrap import ENVIRONMENT
from megatron_m1.rl.sandbox.config import Limits, SandboxConfig
from megatron_m1.rl.sandbox.interpreter import NOBODY, find_python
from megatron_m1.rl.sandbox.outcome import Outcome, SandboxFailed

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_OWN_PROCESSES = 0


class RLimits:
    """Runs a program at a time, as the user nobody where this process is root."""

    remedy = "reward.sandbox.kind=rlimits needs Linux with /proc"

    def __init__(self, config: SandboxConfig) -> None:
        self.python = find_python(config.python)
        self._user = NOBODY if os.geteuid() == 0 else None

    def run(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        files: Mapping[str, bytes | BinaryIO] | None = None,
        stdin: bytes = b"",
    ) -> Outcome:
        """See ``Sandbox.run``; the private folder is a temporary one."""
        with tempfile.TemporaryDirectory(prefix="program.") as folder:
            self._lay_out(Path(folder), files or {})
            status, report = os.pipe()
            try:
                settings = json.dumps({**self._settings(limits), "report": report})
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_SUPERVISOR), settings, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={**ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                    cwd=folder,
                    pass_fds=(report,),
                    start_new_session=True,
                )
            finally:
                os.close(report)
            attended = Attendant(process, stdin, limits, _OWN_PROCESSES, process.terminate).attend()
            with open(status, "rb") as reports:
                return _outcome(attended, reports.read())

    def _lay_out(self, folder: Path, files: Mapping[str, bytes | BinaryIO]) -> None:
        (folder / "input").mkdir()
        for name, data in files.items():
            path = folder / "input" / name
            path.write_bytes(data if isinstance(data, bytes) else data.read())
            path.chmod(0o444)
        if self._user is not None:
            os.chown(folder, self._user, self._user)
        folder.chmod(0o700)
        (folder / "input").chmod(0o755)

    def _settings(self, limits: Limits) -> dict[str, object]:
        return {
            "user": self._user,
            "processes": limits.processes,
            "limits": {
                **{"AS": limits.memory_mb << 20, "FSIZE": limits.files_mb << 20},
                **{"CPU": limits.cpu_seconds, "NOFILE": 256, "CORE": 0},
            },
        }


def _outcome(attended: Attended, report: bytes) -> Outcome:
    if not attended.stopped and not report:
        said = attended.stderr.decode(errors="replace").strip() or "it ended without a word"
        raise SandboxFailed(f"the supervisor of a program did not come back: {said}")
    status = None if attended.stopped else json.loads(report)["exit-code"]
    return Outcome(status, attended.stopped, attended.stdout, attended.stderr, attended.seconds)
