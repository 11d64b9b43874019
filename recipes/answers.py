"""What a text's answer is, and whether it is right. Three styles, chosen once for a data set:

- "hash": what follows the last `####` on its line, and nothing else; numbers are compared as numbers.
- "math": math-verify extracts (the boxed or last expression) and compares; mathematical equality counts.
- "auto": a text with `####` is read as "hash", any other by math-verify; so is the data set's own answer.

There is no other fall back: no last number of the text, no x100; a per cent sign is a unit and never divides.
Knows texts only, no models and no data sets.
"""

from __future__ import annotations

import re
import threading
from decimal import Decimal


STYLES = ("hash", "math", "auto")
MARK = "####"
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?")
_HAS_LATEX_ANCHOR = re.compile(r"\$|\\boxed|\\\(|\\\[")


def check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"`style` must be one of {', '.join(map(repr, STYLES))}, got {style!r}.")


def normalize(answer: str) -> str:
    """One spelling for equal numbers ("+1,200.50" -> "1200.5", "42." -> "42"); other texts only lose outer spaces."""
    answer = answer.strip()
    if not _NUMBER.fullmatch(answer) or not any(character.isdigit() for character in answer):
        return answer
    whole = format(Decimal(answer.replace(",", "")), "f")
    whole = whole.rstrip("0").rstrip(".") if "." in whole else whole
    sign, digits = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    digits = digits.lstrip("0") or "0"
    digits = "0" + digits if digits.startswith(".") else digits
    return "0" if digits == "0" else sign + digits


def hash_answer(text: str) -> str | None:
    """What follows the last `####`, up to the end of the line, normalised; `None` where there is none."""
    _, mark, rest = text.rpartition(MARK)
    return (normalize(rest.split("\n", 1)[0]) or None) if mark else None


def extract_answer(text: str, style: str = "auto") -> str | None:
    """The answer of a text in one spelling per value, e.g. for a vote; `None` where it has none.

    Args:
        text: a generated text.
        style: "hash", "math" or "auto".
    """
    check_style(style)
    if style == "hash" or (style == "auto" and MARK in text):
        return hash_answer(text)
    parsed = _parse(text)
    return normalize(str(parsed[0])) if parsed else None


def is_correct(prediction: str, gold: str, style: str = "auto") -> bool:
    """Whether the text `prediction` ends in the answer `gold`.

    Args:
        prediction: a generated text, not yet reduced to its answer.
        gold: the data set's answer, bare ("42"), marked ("... #### 42") or boxed in a solution.
        style: "hash", "math" or "auto".
    """
    check_style(style)
    marked_gold = hash_answer(gold)
    if style == "hash" or (style == "auto" and MARK in prediction):
        answer = hash_answer(prediction)
        if answer is None:
            return False
        if answer == (normalize(gold) if marked_gold is None else marked_gold):
            return True
        if style == "hash" or _is_number(gold if marked_gold is None else marked_gold):
            return False
        prediction = _anchored(answer)  # "auto" and an answer that is no number: equality is a matter of mathematics
    return _verify(gold if marked_gold is None or style == "math" else marked_gold, prediction)


def _is_number(answer: str) -> bool:
    return bool(_NUMBER.fullmatch(answer.strip())) and any(character.isdigit() for character in answer)


def _verify(gold: str, prediction: str) -> bool:
    from math_verify import verify

    parsed_gold, parsed = _parse(_anchored(gold)), _parse(prediction)
    # the order matters: verify(gold, answer) is not symmetric
    return bool(parsed_gold and parsed and verify(parsed_gold, parsed, timeout_seconds=_timeout()))


def _anchored(answer: str) -> str:
    """A bare answer as the formula that math-verify looks for."""
    return answer if _HAS_LATEX_ANCHOR.search(answer) else f"${answer}$"


def _parse(text: str) -> list:
    from math_verify import parse

    # math-verify takes "72%" for 72 and for 0.72 alike
    return parse(text.replace("\\%", "").replace("%", ""), parsing_timeout=_timeout())


def _timeout() -> int | None:
    """math-verify's timeouts are alarms, which exist on the main thread only."""
    return 5 if threading.current_thread() is threading.main_thread() else None
