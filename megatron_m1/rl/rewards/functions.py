"""Verifiers in a user's file, in the styles of verl, TRL and AReaL."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_m1.errors import InputError
from megatron_m1.rl.rewards.config import VerifierConfig
from megatron_m1.rl.rewards.verdict import ComputeScore

TOKENS = "completion_ids"
"""The entry of ``extra_info`` that holds the response's tokens, for styles that want them."""


def load_function(config: VerifierConfig) -> ComputeScore:
    """The function that a configuration names, behind verl's signature."""
    path = Path(config.file or "")
    if not path.is_file():
        raise InputError(f"{path}, the file of the verifier {config.function}, does not exist")
    function = getattr(_module(path), config.function, None)
    if not callable(function):
        raise InputError(f"{path} has no function {config.function}")
    return _ADAPTERS[config.style](function)


def _module(path: Path) -> ModuleType:
    name = f"verifiers_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"{path} is not a Python file: its name must end with .py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"{path} cannot be loaded: {error!r}") from error
    return sys.modules[name]


def _from_verl(function: Any) -> ComputeScore:
    return function  # type: ignore[no-any-return]


def _from_trl(function: Any) -> ComputeScore:
    """TRL's functions take lists and return one; other columns of the data are keywords."""

    async def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> Any:
        columns = {"answer": ground_truth, "ground_truth": ground_truth, **(extra_info or {})}
        prompt, tokens = columns.pop("prompt", ""), columns.pop(TOKENS, [])
        lists = {name: [value] for name, value in columns.items()}
        scores = function(
            prompts=[prompt], completions=[solution_str], completion_ids=[tokens], **lists
        )
        return (await scores if inspect.isawaitable(scores) else scores)[0]

    return compute_score


def _from_areal(function: Any) -> ComputeScore:
    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> Any:
        columns = {"answer": ground_truth, **(extra_info or {})}
        prompt, tokens = columns.pop("prompt", ""), columns.pop(TOKENS, [])
        return function(prompt, solution_str, None, tokens, **columns)

    return compute_score


_ADAPTERS = {"verl": _from_verl, "trl": _from_trl, "areal": _from_areal}
