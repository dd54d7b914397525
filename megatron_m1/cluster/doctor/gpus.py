"""Cards, their driver, and whether they reach each other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from megatron_m1.cluster.doctor.finding import NOT_CHECKED, OK, PROBLEM, WARNING, Finding

_BUSY_GIB = 1.0
_MEASURED = "index,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"
# The oldest driver of each CUDA, from NVIDIA's release notes.
_OLDEST_DRIVER = {"12": 525, "13": 580}


def examine(expected: int | None) -> Iterator[Finding]:
    """This node's cards.

    Args:
        expected: how many there should be; None takes those that are there.
    """
    if not torch.cuda.is_available():
        yield from _none_seen(expected)
        return
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    found = f"{count} x {', '.join(names)}, CUDA {torch.version.cuda}"
    if expected and count < expected:
        advice = "look at nvidia-smi and the kernel log (Xid); exclude the node and report it"
        yield Finding("GPU", PROBLEM, f"{found}, but {expected} are needed", advice)
    else:
        yield Finding("GPU", OK, found)
    if not all(torch.cuda.get_device_capability(index) >= (8, 0) for index in range(count)):
        yield Finding("GPU", PROBLEM, "older than Ampere", "the kernels need bfloat16: sm_80 on")
    yield from _by_nvidia_smi()
    yield from _peers(count)
    major, minor, patch = torch.cuda.nccl.version()
    yield Finding("NCCL", OK, f"{major}.{minor}.{patch}")


def _none_seen(expected: int | None) -> Iterator[Finding]:
    driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    if driver and torch.version.cuda is None:
        found = f"a driver is here, but torch {torch.__version__} is built without CUDA"
        yield Finding("GPU", PROBLEM, found, "install the build of torch for your CUDA")
    elif driver or expected:
        found = f"torch {torch.__version__} sees none" + (
            f", but {expected} are needed" if expected else ""
        )
        advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a job must ask for GPUs"
        yield Finding("GPU", PROBLEM, found, advice)
    else:
        yield Finding("GPU", NOT_CHECKED, "none here: runs use CPUs and gloo")
    yield Finding("NCCL", NOT_CHECKED, "needs a GPU")


def _by_nvidia_smi() -> Iterator[Finding]:
    command = ["nvidia-smi", f"--query-gpu={_MEASURED}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("driver", NOT_CHECKED, f"nvidia-smi does not answer: {error}")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    yield _driver(rows[0][1])
    for index, _, used, errors in rows:
        if float(used) / 1024 > _BUSY_GIB:
            found = f"card {index}: {float(used) / 1024:.1f} GiB are in use already"
            yield Finding("GPU", WARNING, found, "end what runs there: nvidia-smi names it")
        if errors.isdecimal() and int(errors):
            found = f"card {index}: {errors} uncorrected memory errors"
            yield Finding("GPU", PROBLEM, found, "reset the card or exclude the node; report it")


def _driver(version: str) -> Finding:
    cuda = (torch.version.cuda or "").split(".")[0]
    oldest = _OLDEST_DRIVER.get(cuda)
    if oldest and int(version.split(".")[0]) < oldest:
        advice = f"install {oldest} or newer, or a torch for an older CUDA"
        return Finding("driver", PROBLEM, f"{version} is too old for CUDA {cuda}", advice)
    return Finding("driver", OK, version)


def _peers(count: int) -> Iterator[Finding]:
    """NVLink or PCIe between all cards; without it NCCL goes through the host's memory."""
    apart = [
        (here, there)
        for here in range(count)
        for there in range(count)
        if here != there and not torch.cuda.can_device_access_peer(here, there)
    ]
    if apart:
        found = f"{len(apart)} pairs of cards cannot reach each other, first {apart[0]}"
        advice = "nvidia-smi topo -m; start nvidia-fabricmanager on nodes with NVSwitch"
        yield Finding("NVLink", WARNING, found, advice)
    elif count > 1:
        yield Finding("NVLink", OK, f"each of {count} cards reaches each other one")
