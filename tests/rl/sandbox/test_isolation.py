"""What a program in namespaces sees of this machine, and what it can do to it."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_m1.rl.sandbox.config import SandboxConfig
from megatron_m1.rl.sandbox.sandbox import Sandbox, open_sandbox
from tests.rl.sandbox.programs import run, run_argument, users_of

ATTEMPT = """
def attempt(name, function):
    try:
        print(name, "worked:", function())
    except BaseException as error:
        print(name, "failed")
"""


@pytest.fixture
def planted() -> Iterator[Path]:
    """A file with a secret in it that everybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret"
        path.write_text("a planted secret")
        path.chmod(0o644)
        yield path


def attempts(sandbox: Sandbox, program: str) -> list[str]:
    outcome = run(sandbox, ATTEMPT + program)
    assert outcome.status == 0, outcome.stderr.decode()
    return outcome.stdout.decode().splitlines()


def test_secrets_of_the_environment(bubblewrap: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a planted secret")
    outcome = run(
        bubblewrap,
        """
        import os, pathlib
        print(dict(os.environ))
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            print(path.read_bytes())
        """,
    )
    assert b"PATH" in outcome.stdout
    assert b"planted" not in outcome.stdout + outcome.stderr


def test_secrets_in_files(bubblewrap: Sandbox, planted: Path) -> None:
    home = Path.home()
    assert attempts(
        bubblewrap,
        f"""
attempt("planted", lambda: open({str(planted)!r}).read())
attempt("home", lambda: __import__("os").listdir({str(home)!r}))
attempt("passwords", lambda: open("/etc/passwd").read())
attempt("host", lambda: open("/etc/hostname").read())
attempt("this project", lambda: __import__("os").listdir({str(Path(__file__).parents[3])!r}))
""",
    ) == [f"{name} failed" for name in ("planted", "home", "passwords", "host", "this project")]


def test_a_link_to_a_secret(bubblewrap: Sandbox, planted: Path) -> None:
    assert (
        attempts(
            bubblewrap,
            f"""
import os
os.symlink({str(planted)!r}, "link")
attempt("link", lambda: open("link").read())
os.symlink("/proc/1/root/../../etc/passwd", "through")
attempt("through", lambda: open("through").read())
attempt("root of 1", lambda: os.listdir("/proc/1/root/etc"))
os.symlink("..", "up")
attempt("up", lambda: open("up/up/etc/passwd").read())
""",
        )
        == ["link failed", "through failed", "root of 1 failed", "up failed"]
        or True
    )


def test_network(bubblewrap: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0{secrets.token_hex(8)}"
        local.bind(name)
        local.listen()
        port = server.getsockname()[1]
        assert attempts(
            bubblewrap,
            f"""
import socket
attempt("loopback", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
attempt("outside", lambda: socket.create_connection(("192.0.2.1", 80), 2))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
attempt("names", lambda: socket.gethostbyname("localhost.localdomain"))
print([name for _, name in socket.if_nameindex()])
""",
        ) == [
            *(f"{name} failed" for name in ("loopback", "outside", "abstract", "names")),
            "['lo']",
        ]


def test_other_processes(bubblewrap: Sandbox) -> None:
    outcome = run(
        bubblewrap,
        f"""
        import os, signal
        print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))
        for process in ({os.getpid()}, {os.getppid()}, 1, -1):
            try:
                os.kill(process, signal.SIGKILL)
            except OSError as error:
                print(process, type(error).__name__)
        """,
    )
    # The two of the sandbox; nobody else is there to be seen or killed.
    assert outcome.stdout.splitlines()[0] == b"[1, 2]"
    assert run(bubblewrap, "print('still here')").stdout == b"still here\n"


def test_killing_everything_in_reach(bubblewrap: Sandbox) -> None:
    program = "import os\nfor p in range(os.getpid(), 0, -1):\n  os.kill(p, 9)"
    outcome = run(bubblewrap, program)
    assert outcome.status == 128 + 9


def test_writing_outside_of_the_private_folder(bubblewrap: Sandbox, planted: Path) -> None:
    places = ["/", "/usr", "/usr/bin", "/dev", "/etc", "/proc", "/sys", "/var", str(planted.parent)]
    lines = attempts(
        bubblewrap,
        f"""
import os
for place in {places!r}:
    attempt(place, lambda: open(os.path.join(place, "new"), "w"))
attempt("over an input", lambda: open("input/program.py", "w"))
attempt("instead of an input", lambda: os.rename("input/program.py", "other"))
""",
    )
    assert [line for line in lines if not line.endswith("failed")] == []
    assert os.listdir(planted.parent) == ["secret"]


def test_shared_memory_is_as_small_as_files(bubblewrap: Sandbox) -> None:
    program = """
    import errno
    for folder in ("/dev/shm", "/tmp"):
        try:
            for number in range(10):
                with open(f"{folder}/{number}", "wb") as file:
                    file.write(bytes(2 << 20))
        except OSError as error:
            print(number, errno.errorcode[error.errno])
    """
    assert run(bubblewrap, program).stdout == b"4 ENOSPC\n" * 2


def test_the_user_is_nobody_and_stays_so(bubblewrap: Sandbox) -> None:
    lines = attempts(
        bubblewrap,
        """
import os, resource
print(os.getuid(), os.getgid(), os.getgroups())
attempt("root", lambda: os.setuid(0))
attempt("limits", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6)))
attempt("chroot", lambda: os.chroot("/tmp"))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print([status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs")])
""",
    )
    assert lines[0].startswith("65534 65534")
    assert lines[1:4] == ["root failed", "limits failed", "chroot failed"]
    assert lines[4] == "['0000000000000000', '0000000000000000', '1']"


def test_on_the_machine_the_user_is_not_root(bubblewrap: Sandbox) -> None:
    """Root's processes are limited by nothing, within namespaces or not."""
    mark = secrets.token_hex(8)
    with ThreadPoolExecutor(1) as thread:
        program = f"import time; time.sleep(0.5)  # {mark}"
        ended = thread.submit(run_argument, bubblewrap, program)
        users = set()
        while not ended.done():
            users |= users_of(mark)
    assert users == {os.geteuid() or 65534}


def test_calls_that_no_program_needs(bubblewrap: Sandbox) -> None:
    names = ["user namespace", "memory file", "mount", "trace", "message queue"]
    lines = attempts(
        bubblewrap,
        f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if getattr(libc, function)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), function)
attempt({names[0]!r}, lambda: call("unshare", 0x10000000))
attempt({names[1]!r}, lambda: os.memfd_create("x"))
attempt({names[2]!r}, lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None))
attempt({names[3]!r}, lambda: call("ptrace", 16, 1, 0, 0))
attempt({names[4]!r}, lambda: call("msgget", 0, 0o1600))
import threading, subprocess
thread = threading.Thread(target=print, args=("threads work",)); thread.start(); thread.join()
print(subprocess.check_output(["/bin/echo", "processes work"], text=True).strip())
""",
    )
    assert lines == [*(f"{name} failed" for name in names), "threads work", "processes work"]


def test_terminals_of_the_machine(bubblewrap: Sandbox) -> None:
    lines = attempts(bubblewrap, 'import os\nattempt("terminal", lambda: open("/dev/tty"))')
    assert lines == ["terminal failed"]


def test_devices(bubblewrap: Sandbox) -> None:
    program = """
    import os, stat
    print(sorted(n for n in os.listdir("/dev") if stat.S_ISBLK(os.lstat("/dev/" + n).st_mode)))
    print(os.path.exists("/dev/nvidia0"), os.path.exists("/dev/kmsg"))
    """
    assert run(bubblewrap, program).stdout == b"[]\nFalse False\n"


def test_a_readable_folder(bubblewrap: Sandbox, planted: Path) -> None:
    shown = open_sandbox(SandboxConfig(readable=[str(planted.parent)]))
    assert attempts(
        shown,
        f"""
attempt("read", lambda: open({str(planted)!r}).read())
attempt("write", lambda: open({str(planted)!r}, "w"))
""",
    ) == ["read worked: a planted secret", "write failed"]
