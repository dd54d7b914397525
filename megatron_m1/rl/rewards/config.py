"""How responses are judged; mounted as ``reward``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_m1.rl.sandbox.config import KINDS, Limits, SandboxConfig

USES = ("math", "code", "software", "grade", "compare", "function")
STYLES = ("verl", "trl", "areal")
CREDITS = ("all", "rate")


@dataclass
class VerifierConfig:
    """A verifier for data sources, before those that ship with the project.

    Attributes:
        data_source: a name, or with ``*`` at its end all names that begin so.
        use: math, code, software, grade, compare, or function for one of your own.
        file: the Python file of the function.
        function: its name in that file.
        style: how it is called: verl, trl or areal.
    """

    data_source: str = ""
    use: str = "function"
    file: str | None = None
    function: str = "compute_score"
    style: str = "verl"


@dataclass
class CodeConfig:
    """Programs judged by tests.

    Attributes:
        credit: all (1 where every test passes, else 0) or rate (the share that passes).
        tests: at most this many are run, the first ones; 0 runs all.
        seconds: for all tests of a response; those that do not get to run have failed.
        limits: of one test.
    """

    credit: str = "all"
    tests: int = 0
    seconds: float = 60.0
    limits: Limits = field(default_factory=Limits)


@dataclass
class SoftwareConfig:
    """Patches judged by the tests of a repository.

    Attributes:
        failure: reward of a patch that is refused, does not apply, or fails a test.
        protected: patterns of paths that a patch may not touch, beside the files of the tests.
        limits: of the whole: unpacking, patching, testing.
    """

    failure: float = 0.0
    protected: list[str] = field(
        default_factory=lambda: [
            *("tests/*", "*/tests/*", "test/*", "*/test/*", "test_*.py", "*_test.py"),
            *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"),
            *("tox.ini", "setup.cfg", "pyproject.toml"),
        ]
    )
    limits: Limits = field(
        default_factory=lambda: Limits(
            seconds=600.0, cpu_seconds=600, memory_mb=8192, processes=128, files_mb=2048
        )
    )


@dataclass
class LengthBiasConfig:
    """When a generative reward is suspected to pay for length.

    Attributes:
        window: steps that are looked at, in two halves.
        growth: length grows where the second half's mean is above the first's by this share.
        gain: the task gains where its score in the second half is higher by more than this.
        correlation: of reward with length within prompts, from which on it counts.
    """

    window: int = 20
    growth: float = 0.1
    gain: float = 0.01
    correlation: float = 0.1


@dataclass
class GenerativeConfig:
    """A model that judges, behind an OpenAI-compatible server.

    Attributes:
        url: up to ``/v1``.
        model: its name there.
        key_variable: the environment variable that holds the key, where the server wants one.
        seconds: for an answer, retries included.
        retries: after an error of the server or the network.
        concurrent: questions at a time.
        max_tokens: of an answer.
        max_characters: of a response that is shown; what is longer loses its middle.
        length_bias: when its rewards are suspected.
    """

    url: str | None = None
    model: str = "default"
    key_variable: str | None = None
    seconds: float = 120.0
    retries: int = 3
    concurrent: int = 32
    temperature: float = 0.0
    max_tokens: int = 2048
    max_characters: int = 32_000
    length_bias: LengthBiasConfig = field(default_factory=LengthBiasConfig)


@dataclass
class RewardConfig:
    """How responses are judged.

    Attributes:
        slots: verifications at a time, each in a process of its own; generated tasks need none.
        seconds: for a verification, beyond the time that programs in a sandbox have.
        memory_mb: address space of a verifier's process.
        format_bonus: added for a well-formed answer, where a verifier reports ``format``.
        verifiers: for data sources of your own, before the project's.
        sandbox: where programs run.
    """

    slots: int = 4
    seconds: float = 20.0
    memory_mb: int = 4096
    format_bonus: float = 0.0
    verifiers: list[VerifierConfig] = field(default_factory=list)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    code: CodeConfig = field(default_factory=CodeConfig)
    software: SoftwareConfig = field(default_factory=SoftwareConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)


def reward_problems(config: RewardConfig) -> list[str]:
    """Every reason why rewards cannot be computed so, one sentence each."""
    found = [
        *_not_positive(config, "reward", ("slots", "seconds", "memory_mb")),
        *_not_positive(config.code, "reward.code", ("seconds",)),
        *_not_positive(
            config.generative,
            "reward.generative",
            ("seconds", "concurrent", "max_tokens", "max_characters"),
        ),
        *config.code.limits.problems("reward.code.limits"),
        *config.software.limits.problems("reward.software.limits"),
        *_not_among("reward.sandbox.kind", config.sandbox.kind, KINDS),
        *_not_among("reward.code.credit", config.code.credit, CREDITS),
    ]
    if config.code.tests < 0 or config.generative.retries < 0:
        found.append("reward.code.tests and reward.generative.retries must not be negative")
    if config.generative.url and not config.generative.url.startswith(("http://", "https://")):
        found.append(f"reward.generative.url={config.generative.url} must begin with http(s)://")
    if config.generative.length_bias.window < 2:
        found.append("reward.generative.length_bias.window must be at least 2")
    for place, verifier in enumerate(config.verifiers):
        found += _verifier_problems(f"reward.verifiers[{place}]", verifier)
    return found


def _verifier_problems(key: str, verifier: VerifierConfig) -> list[str]:
    found = [
        *_not_among(f"{key}.use", verifier.use, USES),
        *_not_among(f"{key}.style", verifier.style, STYLES),
    ]
    if not verifier.data_source:
        found.append(f"{key}.data_source is missing: give a data source, or * for all")
    if verifier.use == "function" and not Path(verifier.file or "").is_file():
        found.append(
            f"{key}.file={verifier.file} is no file: give the path of the Python file that has "
            f"the function {verifier.function}"
        )
    if verifier.use != "function" and verifier.file:
        found.append(f"{key}.file={verifier.file} needs {key}.use=function")
    return found


def _not_positive(section: object, key: str, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(section, name) for name in names}
    return [
        f"{key}.{name}={value} must be positive" for name, value in values.items() if value <= 0
    ]


def _not_among(key: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{key}={value} is not one of {', '.join(allowed)}"]
