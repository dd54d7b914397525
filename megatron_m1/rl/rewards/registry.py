"""Which verifier judges the responses to a data source's prompts, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_m1.errors import InputError
from megatron_m1.rl import tasks
from megatron_m1.rl.rewards.config import RewardConfig, VerifierConfig
from megatron_m1.rl.rewards.verdict import ComputeScore
from megatron_m1.rl.sandbox.sandbox import Sandbox, open_sandbox

HERE, THREAD, PROCESS = "here", "thread", "process"
"""Where a verifier runs: in this process at once, since it is quick and cannot hang; in a thread,
since it waits for a server and knows when to give up; in a process that can be killed."""

_SHIPPED = {
    "math": (
        *("openai/gsm8k", "lighteval/MATH*", "DigitalLearningGmbH/MATH*", "HuggingFaceH4/MATH*"),
        *("math*", "aime*", "numina_*"),
    ),
    "code": ("codecontests", "apps", "codeforces", "taco", "livecodebench*", "code/*"),
    "software": ("swe*", "SWE*", "software/*"),
    "grade": ("grade/*",),
    "compare": ("compare/*",),
}
"""Data sources by the verifier that they use: verl's names, and one prefix for each of ours."""


@dataclass(frozen=True)
class Verifier:
    """What judges a data source.

    Attributes:
        use: which verifier it is.
        place: where it runs: HERE, THREAD or PROCESS.
        seconds: the time that it grants programs in a sandbox, beside its own.
        load: gives the function; in the process where it runs, since it may import a lot.
        wants_tokens: whether ``extra_info`` must hold the tokens of the response.
    """

    use: str
    place: str
    seconds: float
    load: Callable[[], ComputeScore]
    wants_tokens: bool = False


class Registry:
    """The verifiers of a configuration. An exact name goes before a prefix, a longer prefix before
    a shorter one, and what is configured before what ships with the project."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._configured = {entry.data_source: entry for entry in config.verifiers}
        self._shipped = {
            name: VerifierConfig(name, use) for use, names in _SHIPPED.items() for name in names
        }
        self._shipped |= {name: VerifierConfig(name, "task") for name in tasks.TASKS}
        self._sandbox: Sandbox | None = None
        self._loaded: dict[str, ComputeScore] = {}

    def verifier(self, data_source: str) -> Verifier:
        """The verifier of a data source.

        Raises:
            InputError: there is none.
        """
        for table in (self._configured, self._shipped):
            found = max(_matching(data_source, table), key=len, default=None)
            if found is not None:
                return self._describe(table[found])
        raise InputError(
            f"no verifier is known for data_source={data_source}: name one in reward.verifiers, or "
            f"use one of {', '.join([*self._shipped])}"
        )

    def function(self, data_source: str) -> ComputeScore:
        """The verifier's function, loaded once."""
        if data_source not in self._loaded:
            self._loaded[data_source] = self.verifier(data_source).load()
        return self._loaded[data_source]

    def sandbox(self) -> Sandbox:
        """The sandbox of this process, opened once.

        Raises:
            SandboxUnavailable: it cannot be.
        """
        if self._sandbox is None:
            self._sandbox = open_sandbox(self._config.sandbox)
        return self._sandbox

    def _describe(self, entry: VerifierConfig) -> Verifier:
        if entry.use == "task":
            return Verifier("task", HERE, 0.0, lambda: tasks.compute_score)
        if entry.use in ("grade", "compare"):
            return Verifier(entry.use, THREAD, 0.0, lambda: self._generative(entry.use))
        if entry.use == "code":
            return Verifier("code", PROCESS, self._config.code.seconds, self._code)
        if entry.use == "software":
            seconds = self._config.software.limits.seconds
            return Verifier("software", PROCESS, seconds, self._software)
        if entry.use == "math":
            return Verifier("math", PROCESS, 0.0, _math)
        return Verifier("function", PROCESS, 0.0, lambda: _function(entry), entry.style != "verl")

    def _code(self) -> ComputeScore:
        from megatron_m1.rl.rewards.code import CodeVerifier

        return CodeVerifier(self._config.code, self.sandbox())

    def _software(self) -> ComputeScore:
        from megatron_m1.rl.rewards.software import SoftwareVerifier

        return SoftwareVerifier(self._config.software, self.sandbox())

    def _generative(self, use: str) -> ComputeScore:
        from megatron_m1.rl.rewards.generative import generative_verifier

        return generative_verifier(use, self._config.generative)


def _math() -> ComputeScore:
    from megatron_m1.rl.rewards.math_answers import compute_score

    return compute_score


def _function(entry: VerifierConfig) -> ComputeScore:
    from megatron_m1.rl.rewards.functions import load_function

    return load_function(entry)


def _matching(data_source: str, table: dict[str, VerifierConfig]) -> Iterator[str]:
    """Names of a table that mean a data source: its own, which no prefix outdoes, or prefixes."""
    if data_source in table:
        yield data_source
        return
    for name in table:
        if name.endswith("*") and data_source.startswith(name[:-1]):
            yield name
