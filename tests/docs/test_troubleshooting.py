"""The sentences on docs/troubleshooting.md are those of the programs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
VALUE = "…"


def sentences() -> Iterator[str]:
    """Every text in the code, with an ellipsis for each value in it."""
    for folder in ("megatron_m1", "parallel", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    yield as_text(node)


def as_text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = [as_text(part) for part in node.values]
        return re.sub(f"{VALUE}+", VALUE, "".join(parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else VALUE


ALL = list(sentences())
OWN = PAGE.split("## What others say")[0]
SHOWN = re.findall(r"^\| `([^`]+)`", OWN, re.MULTILINE)


@pytest.mark.parametrize("shown", SHOWN)
def test_a_sentence_is_one_of_the_programs(shown: str) -> None:
    assert any(shown in sentence for sentence in ALL)


def test_the_page_has_sentences() -> None:
    assert len(SHOWN) > 25
    assert len(SHOWN) == len(set(SHOWN))
