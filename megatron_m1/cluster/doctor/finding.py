"""What a check found, and how it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

OK, WARNING, PROBLEM, NOT_CHECKED = "ok", "warning", "problem", "not checked"
_WIDTH = max(map(len, (OK, WARNING, PROBLEM, NOT_CHECKED)))


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        check: short name of what was looked at.
        outcome: ``ok``; ``warning``: a run works, but worse than it could; ``problem``: it would
            break; ``not checked``: this machine cannot answer.
        found: what is there.
        advice: what to do; given wherever something is to be done.
        hosts: where.
    """

    check: str
    outcome: str
    found: str
    advice: str = ""
    hosts: tuple[str, ...] = ()


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Those that say the same, said once for all their hosts, in the order of their first."""
    together: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts = together.setdefault(replace(finding, hosts=()), [])
        hosts += [host for host in finding.hosts if host not in hosts]
    order = list(dict.fromkeys(finding.check for finding in together))
    found = [replace(finding, hosts=tuple(hosts)) for finding, hosts in together.items()]
    return sorted(found, key=lambda finding: order.index(finding.check))


def breaks_a_run(findings: Iterable[Finding]) -> bool:
    return any(finding.outcome == PROBLEM for finding in findings)


def as_text(findings: list[Finding]) -> str:
    """A line for each finding, its advice below it, and a last line that counts."""
    checks = max(len(finding.check) for finding in findings)
    many = len({host for finding in findings for host in finding.hosts}) > 1
    lines = []
    for finding in _without_repetitions(findings):
        where = f" ({_shown(finding.hosts)})" if many and finding.hosts else ""
        lines.append(
            f"{finding.outcome:{_WIDTH}}  {finding.check:{checks}}  {finding.found}{where}"
        )
        if finding.advice:
            lines.append(f"{'':{_WIDTH}}  {'':{checks}}  -> {finding.advice}")
    return "\n".join([*lines, _count(findings)])


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "fit": not breaks_a_run(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _without_repetitions(findings: list[Finding], most: int = 4) -> list[Finding]:
    """Many nodes say almost the same of their disks: some of each check that is well."""
    seen: Counter[str] = Counter()
    shown = []
    for finding in findings:
        seen[finding.check] += finding.outcome == OK
        if finding.outcome != OK or seen[finding.check] <= most:
            shown.append(finding)
    return shown


def _shown(hosts: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return ", ".join(hosts[:most]) + more


def _count(findings: list[Finding]) -> str:
    numbers = {
        outcome: sum(finding.outcome == outcome for finding in findings)
        for outcome in (PROBLEM, WARNING, NOT_CHECKED)
    }
    return ", ".join(f"{outcome}: {number}" for outcome, number in numbers.items())
