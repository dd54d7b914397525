"""Packages and their versions, against what pyproject.toml asks for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from megatron_m1.cluster.doctor.finding import NOT_CHECKED, OK, PROBLEM, WARNING, Finding

_PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
_SHOWN = ("torch", "megatron-core", "triton", "hydra-core", "transformer-engine")
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "NCCL_DEBUG": "TRACE",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
}


def examine() -> Iterator[Finding]:
    """Versions of what a run stands on, and variables that somebody forgot."""
    yield Finding("python", OK, platform.python_version())
    project = tomllib.loads(_PYPROJECT.read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    optional = [Requirement(line) for line in project["optional-dependencies"]["gpu"]]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate():
            yield from _package(requirement, is_optional=False)
    for requirement in optional:
        yield from _package(requirement, is_optional=True)
    yield from _variables()


def _package(requirement: Requirement, is_optional: bool) -> Iterator[Finding]:
    """Those that matter to numbers are always shown, the others only where something is wrong."""
    name, wanted = requirement.name, str(requirement.specifier)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if is_optional:
            yield Finding(
                name,
                NOT_CHECKED,
                "not installed: linear layers and experts are Megatron-core's own",
                "pip install --no-build-isolation -e '.[gpu]' on GPU machines",
            )
        else:
            yield Finding(name, PROBLEM, f"not installed, {wanted} is needed", "pip install -e .")
        return
    if not requirement.specifier.contains(version, prereleases=True):
        outcome = WARNING if is_optional else PROBLEM
        yield Finding(name, outcome, f"{version}, but {wanted} is needed", "pip install -e .")
    elif name in _SHOWN:
        yield Finding(name, OK, version)


def _variables() -> Iterator[Finding]:
    for name, value in _SLOW.items():
        if os.environ.get(name) == value:
            yield Finding(
                "environment",
                WARNING,
                f"{name}={value} is set, which is for finding errors and slows a run down",
                f"unset {name}",
            )
