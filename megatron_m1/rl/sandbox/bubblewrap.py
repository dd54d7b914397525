"""Programs in namespaces of their own, by bubblewrap (https://github.com/containers/bubblewrap).

A program sees the system's programs and libraries, read only, a private ``/tmp`` in memory, its
own processes, and nothing else: no network, no home, no environment. Where this process is root,
the program's is first made nobody's, since the number of root's processes is limited by nothing.
The limits are set within, where the program cannot raise them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from megatron_m1.rl.sandbox.attending import Attendant, Attended
from megatron_m1.rl.sandbox.config import Limits, SandboxConfig
from megatron_m1.rl.sandbox.interpreter import NOBODY, SYSTEM, find_python, folders_of
from megatron_m1.rl.sandbox.outcome import Outcome, SandboxFailed, SandboxUnavailable
from megatron_m1.rl.sandbox.seccomp import system_call_filter

FALLBACK = (
    "or choose reward.sandbox.kind=rlimits, which limits programs but keeps them from neither "
    "files nor network"
)
REMEDY = (
    "allow user namespaces (user.max_user_namespaces above 0; kernel.unprivileged_userns_clone=1 "
    "on older Debian; on Ubuntu an AppArmor profile for bwrap, or "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that admits "
    f"unshare and mount), {FALLBACK}"
)

ENVIRONMENT = {
    **{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "USER": "nobody"},
    **{"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}
_LINKS_OF_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SETTINGS_OF_LINKER = ("/etc/ld.so.cache", "/etc/alternatives")
_OWN_PROCESSES = 2  # bwrap within the sandbox, which collects ended processes, and the program


class Bubblewrap:
    """Runs a program at a time. ``remedy`` is what to do where it cannot start."""

    remedy = REMEDY

    def __init__(self, config: SandboxConfig) -> None:
        self.python = find_python(config.python)
        self._readable = [*folders_of(self.python), *config.readable]
        self._bwrap, self._prlimit = _program("bwrap", "bubblewrap"), _program("prlimit")
        self._as_nobody: list[str] = []
        if os.geteuid() == 0:
            user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            self._as_nobody = [_program("setpriv"), *user]
        filtered = system_call_filter()
        if filtered is None:
            raise SandboxUnavailable(
                f"reward.sandbox.kind=bubblewrap has no filter of system calls for "
                f"{os.uname().machine}; it has them for x86_64 and aarch64, {FALLBACK}"
            )
        self._filter = filtered

    def run(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        files: Mapping[str, bytes | BinaryIO] | None = None,
        stdin: bytes = b"",
    ) -> Outcome:
        """See ``Sandbox.run``; the private folder is ``/tmp``."""
        with ExitStack() as stack:
            inputs = {name: _descriptor(stack, data) for name, data in (files or {}).items()}
            rules = _descriptor(stack, self._filter)
            status, report = os.pipe()
            stack.callback(os.close, status)
            try:
                process = subprocess.Popen(
                    self._command(command, limits, inputs, rules, report),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={},
                    pass_fds=(*inputs.values(), rules, report),
                    start_new_session=True,
                )
            finally:
                os.close(report)
            attended = Attendant(process, stdin, limits, _OWN_PROCESSES, process.kill).attend()
            return _outcome(attended, _reports(status))

    def _command(
        self,
        command: Sequence[str],
        limits: Limits,
        inputs: Mapping[str, int],
        rules: int,
        report: int,
    ) -> list[str]:
        return [
            *self._as_nobody,
            self._bwrap,
            *("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"),
            *_environment(),
            *_system(),
            *_private_folders(limits.files_mb << 20),
            *(word for folder in self._readable for word in ("--ro-bind", folder, folder)),
            *(
                word
                for name, descriptor in inputs.items()
                for word in ("--ro-bind-data", str(descriptor), f"/tmp/input/{name}")
            ),
            *("--remount-ro", "/", "--chdir", "/tmp"),
            *("--seccomp", str(rules), "--json-status-fd", str(report), "--"),
            *self._limited(limits),
            *command,
        ]

    def _limited(self, limits: Limits) -> list[str]:
        """The program that sets the limits, soft and hard, and then becomes the command."""
        memory, files, cpu = limits.memory_mb << 20, limits.files_mb << 20, limits.cpu_seconds
        return [
            self._prlimit,
            *(f"--as={memory}:{memory}", f"--fsize={files}:{files}", f"--cpu={cpu}:{cpu + 1}"),
            *(f"--nproc={limits.processes}:{limits.processes}", "--nofile=256:256", "--core=0:0"),
            *("--memlock=0:0", "--msgqueue=0:0", "--"),
        ]


def _program(name: str, package: str = "util-linux") -> str:
    found = shutil.which(name)
    if found is None:
        raise SandboxUnavailable(
            f"reward.sandbox.kind=bubblewrap needs the program {name}: install the system's "
            f"package {package}, {FALLBACK}"
        )
    return found


def _environment() -> Iterable[str]:
    yield "--clearenv"
    for name, value in ENVIRONMENT.items():
        yield from ("--setenv", name, value)


def _system() -> Iterator[str]:
    """Programs and libraries of the system, read only."""
    yield from ("--ro-bind", SYSTEM, SYSTEM)
    for folder in map(Path, _LINKS_OF_SYSTEM):
        if folder.is_symlink():
            yield from ("--symlink", os.readlink(folder), str(folder))
        elif folder.is_dir():
            yield from ("--ro-bind", str(folder), str(folder))
    for path in _SETTINGS_OF_LINKER:
        yield from ("--ro-bind-try", path, path)


def _private_folders(size: int) -> Iterator[str]:
    """What the program may write: two folders in memory, of a limited size."""
    yield from ("--proc", "/proc", "--dev", "/dev")
    for folder in ("/dev/shm", "/tmp"):
        yield from ("--size", str(size), "--tmpfs", folder)
    yield from ("--remount-ro", "/dev")


def _descriptor(stack: ExitStack, data: bytes | BinaryIO) -> int:
    """A file descriptor from which the data are read, closed with the stack."""
    if not isinstance(data, bytes):
        return data.fileno()
    descriptor = os.memfd_create("input")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _reports(status: int) -> dict[str, int]:
    """What bubblewrap said of the program: one JSON object a line, written from outside of it."""
    os.set_blocking(status, False)
    found: dict[str, int] = {}
    with contextlib.suppress(BlockingIOError):
        for line in os.read(status, 1 << 16).splitlines():
            found |= json.loads(line)
    return found


def _outcome(attended: Attended, reports: Mapping[str, int]) -> Outcome:
    status = None if attended.stopped else reports.get("exit-code")
    if status is None and not attended.stopped:
        said = attended.stderr.decode(errors="replace").strip() or "it ended without a word"
        raise SandboxFailed(f"bubblewrap did not run a program: {said}")
    return Outcome(status, attended.stopped, attended.stdout, attended.stderr, attended.seconds)
