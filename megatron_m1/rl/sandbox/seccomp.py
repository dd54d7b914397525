"""A filter of system calls for programs in a sandbox, as Linux reads it (seccomp, classic BPF).

Namespaces hide files, processes and network. The filter takes away what remains and no solution of
a problem needs: making namespaces, mounting, looking into other processes, sockets to the host of a
virtual machine (no namespace of networks holds them), and memory that no limit counts
(``memfd_create``, System V segments and queues). Refused calls fail with EPERM.
"""

from __future__ import annotations

import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in the kernel's seccomp_data
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag of clone

_CLONE3 = 435  # its flags lie in memory, where a filter cannot look; libraries fall back to clone
_VSOCK = 40  # family of sockets between a virtual machine and its host
_BY_ARCHITECTURE = {
    "x86_64": (0xC000003E, 56, 41),
    "aarch64": (0xC00000B7, 220, 198),
}
"""The audit code of an architecture and its numbers of ``clone`` and ``socket``."""
_REFUSED = {
    "x86_64": {
        **{"shmget": 29, "msgget": 68, "ptrace": 101, "pivot_root": 155, "chroot": 161},
        **{"mount": 165, "umount2": 166, "add_key": 248, "request_key": 249, "keyctl": 250},
        **{"unshare": 272, "perf_event_open": 298, "name_to_handle_at": 303},
        **{"open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310},
        **{"process_vm_writev": 311, "kcmp": 312, "memfd_create": 319, "bpf": 321},
        **{"userfaultfd": 323},
    },
    "aarch64": {
        **{"umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "unshare": 97},
        **{"ptrace": 117, "msgget": 186, "shmget": 194, "add_key": 217, "request_key": 218},
        **{"keyctl": 219, "perf_event_open": 241, "name_to_handle_at": 264},
        **{"open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270},
        **{"process_vm_writev": 271, "kcmp": 272, "memfd_create": 279, "bpf": 280},
        **{"userfaultfd": 282},
    },
}
_REFUSED_EVERYWHERE = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428},
    **{"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433},
    **{"pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447},
}


def system_call_filter(machine: str | None = None) -> bytes | None:
    """The filter for an architecture, this machine's by default; None where there is none."""
    machine = machine or platform.machine()
    if machine not in _BY_ARCHITECTURE:
        return None
    audit_code, clone, socket = _BY_ARCHITECTURE[machine]
    refused = {**_REFUSED[machine], **_REFUSED_EVERYWHERE}
    program = [
        _step(_LOAD, _ARCHITECTURE),
        *_unless_skipped(_EQUAL, audit_code, _KILL, met=True),
        _step(_LOAD, _NUMBER),
        *_unless_skipped(_AT_LEAST, _X32, _ERRNO | _ENOSYS),
        *_unless_skipped(_EQUAL, _CLONE3, _ERRNO | _ENOSYS),
    ]
    for number in sorted(refused.values()):
        program += _unless_skipped(_EQUAL, number, _ERRNO | _EPERM)
    program += [
        *_refused_with(clone, _ANY_BIT, _NEW_NAMESPACES),
        *_refused_with(socket, _EQUAL, _VSOCK),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _refused_with(number: int, test: int, value: int) -> list[bytes]:
    """Decide on a call by its first argument; other calls go on to the next step."""
    return [
        _step(_EQUAL, number, jump_unmet=4),
        _step(_LOAD, _FIRST_ARGUMENT),
        *_unless_skipped(test, value, _ERRNO | _EPERM),
        _step(_RETURN, _ALLOW),
    ]


def _unless_skipped(test: int, value: int, result: int, *, met: bool = False) -> list[bytes]:
    """Return ``result`` where the test is met; with ``met``, where it is not."""
    return [_step(test, value, int(met), int(not met)), _step(_RETURN, result)]


def _step(code: int, value: int, jump_met: int = 0, jump_unmet: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_met, jump_unmet, value)
