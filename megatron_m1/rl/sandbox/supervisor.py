"""Runs a command within resource limits, and ends all that it started when it ends.

A program of its own (``python -I -S supervisor.py SETTINGS COMMAND...``), so that leftovers of the
command fall to it: orphans become children of a process that asked for them (a subreaper), and not
of the trainer's. With SIGTERM, or when its parent dies, it stops the command.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_FAILED = 125  # exit status of the supervisor where it could not start the command


def main() -> None:
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(settings["report"], False)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Blocked until there is a child to stop.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child == 0:
        become(command, settings)
    signal.signal(signal.SIGTERM, lambda *_: kill_descendants())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    status = wait_for(child)
    kill_descendants()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    os.write(settings["report"], json.dumps({"exit-code": status}).encode())


def become(command: list[str], settings: dict[str, Any]) -> None:
    """Turn this process into the command, limited, and another user where that is asked for."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.setsid()
        user = settings["user"]
        others = threads_of(os.getuid() if user is None else user)
        limits = {**settings["limits"], "NPROC": settings["processes"] + others}
        for name, limit in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        os.execv(command[0], command)
    except BaseException as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(_FAILED)


def wait_for(child: int) -> int:
    """The status with which the child ends; other children that end are collected too."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def kill_descendants() -> None:
    """End every descendant, and those that became children meanwhile, until none is alive."""
    while children := living_children(os.getpid()):
        for child in children:
            kill(child)


def kill(process: int) -> None:
    """End a process and its descendants."""
    try:
        # A stopped process starts no others while its children are looked for.
        os.kill(process, signal.SIGSTOP)
        for child in living_children(process):
            kill(child)
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def living_children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return [child for child in found if state_of(child) not in ("Z", "X", None)]


def state_of(process: int) -> str | None:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def threads_of(user: int) -> int:
    """Threads that run as a user: the limit on processes counts them all."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if int(lines["Uid"].split()[0]) == user:
            count += int(lines["Threads"])
    return count


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    main()
