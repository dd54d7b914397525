"""What a program may use, with and without namespaces around it."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_m1.rl.sandbox.sandbox import Sandbox
from tests.rl.sandbox.programs import remain, run, run_argument


def test_what_a_program_reads_prints_and_returns(sandbox: Sandbox) -> None:
    outcome = run(
        sandbox,
        """
        import sys
        print(sys.stdin.read()[::-1])
        print("on the side", file=sys.stderr)
        sys.exit(7)
        """,
        stdin=b"abc",
    )
    assert (outcome.status, outcome.stopped) == (7, None)
    assert (outcome.stdout, outcome.stderr) == (b"cba\n", b"on the side\n")


def test_a_signal_is_in_the_status(sandbox: Sandbox) -> None:
    assert run(sandbox, "import os; os.kill(os.getpid(), 9)").status == 128 + 9


def test_a_program_that_sleeps_for_ever(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(8)
    outcome = run_argument(sandbox, f"import time; time.sleep(1000)  # {mark}", seconds=0.5)
    assert (outcome.status, outcome.stopped) == (None, "seconds")
    assert not remain(mark)


def test_a_loop_without_end_runs_out_of_processor_time(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "while True: pass", cpu_seconds=1)
    assert outcome.stopped is None
    assert outcome.status in (128 + 24, 128 + 9)


def test_a_program_that_ignores_signals(sandbox: Sandbox) -> None:
    outcome = run(
        sandbox,
        """
        import signal, time
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
        """,
        seconds=0.5,
    )
    assert outcome.stopped == "seconds"


def test_fork_bomb(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(8)
    program = f"""
import os
while True:
    try:
        os.fork()
    except OSError:
        pass  # {mark}
"""
    outcome = run_argument(sandbox, program, seconds=1.0, processes=8)
    assert outcome.stopped in ("seconds", "processes")
    assert not remain(mark)


def test_a_few_processes_are_allowed(sandbox: Sandbox) -> None:
    program = """
    import subprocess, sys
    for _ in range(5):
        print(subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout)
    """
    assert run(sandbox, program).stdout == b"b'1\\n'\n" * 5


def test_memory_of_one_process(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "bytearray(1 << 30)")
    assert outcome.status == 1
    assert b"MemoryError" in outcome.stderr


def test_memory_of_several_processes(sandbox: Sandbox) -> None:
    program = """
    import os, time
    for _ in range(4):
        if os.fork() == 0:
            break
    kept = b"x" * (100 << 20)
    time.sleep(1000)
    """
    assert run(sandbox, program).stopped == "memory"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_end(sandbox: Sandbox, stream: str) -> None:
    outcome = run(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert outcome.stopped == "output"
    assert len(outcome.stdout) + len(outcome.stderr) == 64 * 1024 + 1


def test_much_output_at_once(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "print('x' * (100 << 20))", memory_mb=512)
    assert outcome.stopped == "output"


def test_a_large_file(sandbox: Sandbox) -> None:
    program = """
    import os
    with open("large", "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError as error:
            print("refused", os.path.getsize("large") <= 8 << 20)
    """
    outcome = run(sandbox, program)
    # The signal of a file that is too large ends a program that does not ignore it; Python does.
    assert outcome.stdout == b"refused True\n"


def test_no_core_is_dumped(sandbox: Sandbox) -> None:
    program = """
    import os, subprocess, sys
    subprocess.run([sys.executable, "-c", "import os; os.abort()"], stderr=subprocess.DEVNULL)
    print(sorted(os.listdir(".")))
    """
    assert run(sandbox, program).stdout == b"['input']\n"


def test_input_that_nobody_reads(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "print('done')", stdin=b"x" * (4 << 20))
    assert (outcome.status, outcome.stdout) == (0, b"done\n")


def test_input_larger_than_a_pipe(sandbox: Sandbox) -> None:
    program = "import sys; print(len(sys.stdin.buffer.read()))"
    assert run(sandbox, program, stdin=b"x" * (4 << 20)).stdout == b"4194304\n"


def test_a_program_that_waits_for_more_input_than_there_is(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "import sys\nwhile True: print(repr(sys.stdin.readline()), flush=True)")
    assert outcome.stopped == "output"
    assert outcome.stdout.startswith(b"''\n")


def test_a_program_that_closes_its_streams(sandbox: Sandbox) -> None:
    program = "import os, time\nfor n in range(3): os.close(n)\ntime.sleep(1000)"
    assert run(sandbox, program, seconds=0.5).stopped == "seconds"


def test_a_daemon_ends_with_the_program(sandbox: Sandbox) -> None:
    mark = secrets.token_hex(8)
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)  # {mark}
    os._exit(0)
os.wait()
print("gone")
"""
    outcome = run_argument(sandbox, program)
    assert (outcome.status, outcome.stdout) == (0, b"gone\n")
    assert not remain(mark)


def test_runs_at_the_same_time(sandbox: Sandbox) -> None:
    def squared(number: int) -> bytes:
        program = "import time; n = int(input()); time.sleep(0.2); open('own', 'x'); print(n * n)"
        return run(sandbox, program, stdin=str(number).encode()).stdout

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(squared, range(8))) == [b"%d\n" % (n * n) for n in range(8)]


def test_nothing_is_left_of_an_earlier_run(sandbox: Sandbox) -> None:
    program = "import os; print(os.listdir('.')); open('left', 'w')"
    assert [run(sandbox, program).stdout for _ in range(2)] == [b"['input']\n"] * 2


def test_the_time_of_a_run_is_told(sandbox: Sandbox) -> None:
    started = time.monotonic()
    outcome = run(sandbox, "import time; time.sleep(0.3)")
    assert 0.3 <= outcome.seconds <= time.monotonic() - started
