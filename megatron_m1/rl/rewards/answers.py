"""The parts of a response: what comes after the thoughts, the final answer, fenced blocks."""

from __future__ import annotations

import re

END_OF_THOUGHTS = "</think>"
_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_AFTER_MARK = re.compile(
    r"^.*(?:####|\*{0,2}(?:Final )?Answer\*{0,2}\s*:\*{0,2})\s*(.*)$",
    re.MULTILINE | re.IGNORECASE,
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def after_thoughts(response: str) -> str:
    """What a response says once it has thought: all of it, where it does not mark its thoughts."""
    return response.rpartition(END_OF_THOUGHTS)[2]


def final_answer(response: str) -> str | None:
    """The last boxed answer, or what follows the last ``####`` (GSM8K) or ``Answer:`` (DAPO)."""
    text = after_thoughts(response)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _AFTER_MARK.findall(text)
    return marked[-1].strip(" $\t\r") if marked else None


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close."""
    open_braces: list[int | None] = []  # where the content of a box begins; None for other braces
    found: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and (found is None or begin > found[0]):
                found = (begin, token.start())
    return text[slice(*found)].strip() if found else None


def last_fenced(response: str, languages: tuple[str, ...]) -> str | None:
    """The last fenced block in one of the languages or in none; None where there is none."""
    blocks = _FENCED.findall(after_thoughts(response))
    wanted = [code for language, code in blocks if language.lower() in (*languages, "")]
    return wanted[-1] if wanted else None
