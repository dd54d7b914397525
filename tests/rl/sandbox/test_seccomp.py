"""The filter of system calls, stepped through as the kernel would."""

from __future__ import annotations

import struct

import pytest

from megatron_m1.rl.sandbox import seccomp

ALLOWED = 0x7FFF0000
EPERM, ENOSYS = 0x00050001, 0x00050026
KILLED = 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
READ = {"x86_64": 0, "aarch64": 63}
UNSHARE = {"x86_64": 272, "aarch64": 97}
CLONE = {"x86_64": 56, "aarch64": 220}

each_machine = pytest.mark.parametrize("machine", AUDIT)


def decide(machine: str, number: int, argument: int = 0, audit: int | None = None) -> int:
    """What the filter says of a call."""
    program = seccomp.system_call_filter(machine)
    assert program is not None
    steps = list(struct.iter_unpack("=HBBI", program))
    data = struct.pack("=IIQQ", number, AUDIT[machine] if audit is None else audit, 0, argument)
    place, held = 0, 0
    while True:
        code, met, unmet, value = steps[place]
        place += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (held,) = struct.unpack_from("=I", data, value)
        else:
            tests = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}
            place += met if tests[code] else unmet


@each_machine
def test_ordinary_calls(machine: str) -> None:
    refused = {n for n in range(500) if decide(machine, n) != ALLOWED}
    assert READ[machine] not in refused
    assert {UNSHARE[machine], 425, 442, 447} <= refused
    assert len(refused) < 50


@each_machine
def test_namespaces(machine: str) -> None:
    assert decide(machine, UNSHARE[machine]) == EPERM
    # A thread, a child, and a child in a user namespace.
    assert decide(machine, CLONE[machine], 0x3D0F00) == ALLOWED
    assert decide(machine, CLONE[machine], 17) == ALLOWED
    assert decide(machine, CLONE[machine], 0x10000000 | 17) == EPERM
    assert decide(machine, 435) == ENOSYS


@each_machine
def test_sockets_to_the_host_of_a_virtual_machine(machine: str) -> None:
    socket = {"x86_64": 41, "aarch64": 198}[machine]
    assert [decide(machine, socket, family) for family in (1, 2, 10)] == [ALLOWED] * 3
    assert decide(machine, socket, 40) == EPERM


def test_calls_of_another_architecture() -> None:
    assert decide("x86_64", READ["x86_64"], audit=0x40000003) == KILLED
    assert decide("x86_64", 0x40000000 | READ["x86_64"]) == ENOSYS


def test_the_clone_flags_are_where_the_kernel_puts_them() -> None:
    # seccomp_data: number, architecture, instruction pointer, arguments.
    assert struct.calcsize("=IIQ") == seccomp._FIRST_ARGUMENT


def test_a_machine_without_a_filter() -> None:
    assert seccomp.system_call_filter("riscv64") is None
