"""Exact match: compare the final numbers of two answers, however written."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"(?:(?<!\d)-)?"  # a minus sign; in `5-3` it subtracts
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/\d+)?"
)


def final_answer(text: str) -> str | None:
    """Return the number after the last `####`, else the last one in the text, as an integer or fraction.

    None if there is no number.
    """
    _, marked, tail = text.rpartition("####")
    numbers: list[str] = NUMBER.findall(tail if marked else text)
    if not numbers:
        return None
    number = (numbers[0] if marked else numbers[-1]).replace(",", "")
    numerator, _, denominator = number.partition("/")
    try:
        return str(Fraction(numerator) / Fraction(denominator or 1))
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or 1/0
        return number


def same_answer(text: str, reference: str) -> bool:
    """True if both have the same final number; a text without a number is never right."""
    answer = final_answer(text)
    return answer is not None and answer == final_answer(reference)
