"""The parts of a response."""

from __future__ import annotations

import pytest

from megatron_m1.rl.rewards.answers import after_thoughts, final_answer, last_boxed, last_fenced


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"} \boxed{a_{1}} {", "a_{1}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{1}</think> it is \boxed{2}", "2"),
        (r"\boxed{1}</think> it is", None),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234\n", "1,234"),
        ("Answer: 5\nAnswer: 6", "6"),
        ("**Answer:** $x^2$", "x^2"),
        ("The final answer: 8 ", "8"),
        ("it is 9", None),
        ("", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def test_many_open_boxes_take_no_time() -> None:
    assert last_boxed(r"\boxed{" * 5000) is None


def test_after_thoughts() -> None:
    assert after_thoughts("a</think>b</think>c") == "c"
    assert after_thoughts("a<think>b") == "a<think>b"


@pytest.mark.parametrize(
    ("response", "block"),
    [
        ("```python\na = 1\n```\nbetter:\n```python\na = 2\n```", "a = 2\n"),
        ("```py\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nwhich prints\n```text\nb\n```", "a\n"),
        ("```cpp\na\n```", None),
        ("```python\na", None),
        ("```python\na\n```</think>```python\n", None),
        ("none", None),
    ],
)
def test_last_fenced(response: str, block: str | None) -> None:
    assert last_fenced(response, ("python", "py")) == block
