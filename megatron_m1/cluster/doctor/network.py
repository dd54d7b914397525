"""Rails, interfaces, names and the port at which processes meet."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_m1.cluster.doctor.finding import NOT_CHECKED, OK, PROBLEM, WARNING, Finding

_DEVICES = Path("/sys/class/infiniband")
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Rail:
    """A port of an InfiniBand or RoCE device."""

    name: str
    state: str
    rate: str
    layer: str

    @property
    def is_up(self) -> bool:
        return "ACTIVE" in self.state


def examine(gpus: int, nodes: int, devices: Path = _DEVICES) -> Iterator[Finding]:
    """This node's ways to the others."""
    yield from _rails(gpus, nodes, list(rails(devices)))
    yield from _interfaces()
    yield from _name(nodes)


def rails(devices: Path) -> Iterator[Rail]:
    """Every port that the kernel knows."""
    for port in sorted(devices.glob("*/ports/*")):
        texts = [
            (port / file).read_text().strip() if (port / file).exists() else "unknown"
            for file in ("state", "rate", "link_layer")
        ]
        yield Rail(f"{port.parents[1].name}:{port.name}", *texts)


def _rails(gpus: int, nodes: int, found: list[Rail]) -> Iterator[Finding]:
    if not found:
        if gpus and nodes > 1:
            advice = "load the drivers (mlx5_ib), or expect the speed of sockets"
            yield Finding("InfiniBand", WARNING, "no device: NCCL uses sockets", advice)
        else:
            yield Finding("InfiniBand", NOT_CHECKED, "no device here")
        return
    down = [rail for rail in found if not rail.is_up]
    up = [rail for rail in found if rail.is_up]
    kinds = ", ".join(sorted({f"{rail.layer} {rail.rate}" for rail in up})) or "none"
    text = f"{len(up)} of {len(found)} ports are up: {kinds}"
    if not up or len(up) < gpus:
        advice = f"look at ibstat; {', '.join(rail.name for rail in down) or 'no port'} is down"
        yield Finding("InfiniBand", WARNING if up else PROBLEM, text, advice)
    else:
        yield Finding("InfiniBand", OK, text)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY:
        advice = "set it to unlimited for slurmd or the container (LimitMEMLOCK, --ulimit memlock)"
        yield Finding("InfiniBand", PROBLEM, f"only {locked} bytes may be locked", advice)


def _interfaces() -> Iterator[Finding]:
    """The interfaces that variables name must exist: gloo and NCCL end with words that hide it."""
    here = psutil.net_if_addrs()
    for variable in _INTERFACES:
        value = os.environ.get(variable, "")
        names = [
            name.lstrip("=") for name in value.split(",") if name and not value.startswith("^")
        ]
        if names and not any(known.startswith(name) for name in names for known in here):
            found = f"{variable}={value}, but the interfaces are {', '.join(sorted(here))}"
            yield Finding("interface", PROBLEM, found, "give it in cluster.environment")


def _name(nodes: int) -> Iterator[Finding]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        advice = "add the host to DNS or its hosts file"
        yield Finding("name", PROBLEM, f"{host} has no address: {error}", advice)
        return
    if nodes > 1 and address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        advice = "give GLOO_SOCKET_IFNAME in cluster.environment, or mend the hosts file"
        yield Finding("name", PROBLEM, f"{host} is {address}, which no other node reaches", advice)
    else:
        yield Finding("name", OK, f"{host} is {address}")


def port_finding(address: str, port: int) -> Finding:
    """Whether the first process can listen where the others will look for it."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
    except OSError as error:
        advice = "another job or service has it: end that, or start the job anew"
        return Finding("port", PROBLEM, f"{address}:{port}: {error.strerror}", advice)
    return Finding("port", OK, f"{address}:{port}")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
