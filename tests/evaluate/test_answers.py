from __future__ import annotations

import pytest

from raymoe.evaluate.answers import final_answer, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1,234", "1234"),
        ("#### -3.50", "-7/2"),
        ("so it costs $5.", "5"),
        ("#### 3/4", "3/4"),
        ("no number here", None),
        ("", None),
        ("#### none", None),
        ("2 + 2 = 4\n#### 4\n", "4"),
        ("#### 7 apples, 8 pears", "7"),
        ("first #### 1 then #### 2", "2"),
        ("I had 3, then 5", "5"),
        ("#### 100", "100"),
        ("#### 1,000,000.00", "1000000"),
        ("#### .5", "1/2"),
        ("#### -.25", "-1/4"),
        ("#### $12", "12"),
        ("#### 0.10", "1/10"),
        ("#### 007", "7"),
        ("#### 12345678901234567890123", "12345678901234567890123"),
        ("5-3", "3"),
        ("5 - -3", "-3"),
        ("it is -3", "-3"),
        ("1,2", "2"),
        ("1,234", "1234"),
        ("1,234,567.5", "2469135/2"),
        ("12,34", "34"),
        ("1234,567", "567"),
        ("1,2345", "2345"),
        ("#### -0", "0"),
        ("#### 1/0", "1/0"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_final_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("#### 1234", "so\n#### 1,234", True),
        ("it is 1234.0", "#### 1,234", True),
        ("#### 5", "#### .5", False),
        ("#### 4", "#### 5", False),
        ("#### -4", "#### 4", False),
        ("#### -0", "#### 0", True),
        ("#### 6/8", "#### 3/4", True),
        ("#### 1/2", "#### 0.5", True),
        ("#### 1/2", "#### 2", False),
        ("#### 1/3", "#### 0.333", False),
        ("nothing", "nothing", False),
        ("nothing", "#### 5", False),
    ],
)
def test_same_answers(text: str, reference: str, same: bool) -> None:
    assert same_answer(text, reference) is same
