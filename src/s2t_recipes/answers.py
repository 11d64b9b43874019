r"""What a text's answer is, whether it is right, which texts have the same. Three styles, chosen once for a data set:

- "hash": what follows the last `####` on its line, and nothing else; numbers are compared as numbers.
- "math": math-verify extracts (the boxed or last expression) and compares; mathematical equality counts.
- "auto": a text with `####` is read as "hash", any other by math-verify; so is the data set's own answer. A line of
  `####` that is a formula, or has a box, is compared by math-verify too. One that is no number, in a text with a
  `\boxed{...}` behind it, or before it and more text behind, is a Markdown heading and does not count.

In every style a number may stand in `$...$`, `\(...\)`, `\boxed{...}` or `**...**`, have its thousands set apart
(`8,000`, `8\,000`, `8{,}000`, `8 000`) and a unit in roman type behind it (`24\,\mathrm{cm}^2`). A `\boxed{` that is
not closed, as in a text that was cut off, is no answer, and what follows it is not read: what stands before it counts,
an earlier box above all.

There is no other fall back: no last number of the text, no x100; a per cent sign is a unit and never divides.
Knows texts only, no models and no data sets.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from transformers_s2t.config import check_choice


STYLES = ("hash", "math", "auto")
MARK = "####"
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,3}( \d{3})+|\d+)?(\.\d*)?")
_HAS_LATEX_ANCHOR = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
_IS_LATEX = re.compile(r"(?<!\\)\$[^$]+\$|\\[a-zA-Z(\[]")
_COMMAND = re.compile(r"\\(?:text|math)[a-z]*\s*\{[^{}]*\}|\\[a-zA-Z]+")
_BOX = "\\boxed{"
_WRAPPERS = [
    re.compile(pattern + r"\.?", re.DOTALL)
    for pattern in (
        r"\$\$([^$]+)\$\$",
        r"\$([^$]+)(?<!\\)\$",
        r"\\\(((?:(?!\\\)).)+)\\\)",
        r"\\\[((?:(?!\\\]).)+)\\\]",
        r"\*\*([^*]+)\*\*",
        r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
    )
]
# what may stand between thousands: a thin, negative or unbreakable space, a comma that takes no space
_GAP = r"(?: ?(?:\\[,;:!> ]|\\thinspace|~|[\u00a0\u2007\u2009\u202f]|\{\\[,;:!]\}|,\\!|\{,\}(?:\\!)?) ?)"
# any of these, and of spaces, before a unit; possessive, so that no text of many of them takes long
_GAPS = r"(?:\s|~|\\thinspace|\\[,;:!> ]|\{\\[,;:!]\}|,\\!|\{,\})*+"
_GROUPED = re.compile(rf"(?<![\d.^_])(?<!\d,)\d{{1,3}}(?:{_GAP}\d{{3}})+(?!\d)")
_SPACED = re.compile(r"(?<=[{$])\s*[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*(?=[}$])")
_ROMAN = r"\\(?:mathrm|text|textrm|textnormal|mbox|mathsf|textsf|rm)\s*"
_UNIT = re.compile(
    rf"(?<=[\d.]){_GAPS}(?:{_ROMAN}\{{(?!\s*~?\s*(?:hundred|thousand|[mbtr]+illion|dozen|percent))[^{{}}^\d]*"
    r"(?:\^\{?-?\d\}?[^{}^\d]*)*\}(?:\s*\^\s*(?:-?\d|\{\s*-?\d\s*\}))?)\.?\Z"
)
_ITALIC_UNIT = re.compile(rf"(?<=[\d}}])({_GAPS})(mm|cm|dm|km|ft)\s*(\^\s*(?:[23]|\{{[23]\}}))(?=\.?\s*[}}$])")


def normalize(answer: str) -> str:
    """One spelling for equal numbers ("+1,200.50" -> "1200.5", "42." -> "42", "$8\\,000$" -> "8000").

    Other texts only lose outer spaces, and a `$...$`, `\\boxed{...}` or `**...**` around all of them.
    """
    answer = _join_thousands(_unwrap(answer.strip()))
    if _is_number(without_unit := _UNIT.sub("", answer)):
        answer = without_unit
    if not _is_number(answer):
        return answer
    whole = format(Decimal(answer.replace(",", "").replace(" ", "")), "f")
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
    """The answer of a text in one spelling per number; `None` where it has none. See `stand_ins` for a vote.

    Args:
        text: a generated text.
        style: "hash", "math" or "auto".
    """
    check_choice("style", style, STYLES)
    answer = _read(text, style)
    return None if answer is None else answer.spelling


def is_correct(prediction: str, gold: str, style: str = "auto") -> bool:
    """Whether the text `prediction` ends in the answer `gold`.

    Args:
        prediction: a generated text, not yet reduced to its answer.
        gold: the data set's answer, bare ("42"), marked ("... #### 42") or boxed in a solution.
        style: "hash", "math" or "auto".
    """
    return grade(prediction, gold, style)[1]


def grade(prediction: str, gold: str, style: str = "auto") -> tuple[str | None, bool]:
    """The answer of a text and whether it is right, as `extract_answer` and `is_correct` say, read once."""
    check_choice("style", style, STYLES)
    answer = _read(prediction, style)
    return (None, False) if answer is None else (answer.spelling, _is_right(answer, _read_gold(gold, style), style))


def stand_ins(texts: Sequence[str], style: str = "auto") -> list[int | None]:
    """For each text the index of the one that stands for its answer in a vote: the same index, the same answer.

    Two answers are the same where `is_correct` takes either for right by the other, or where a chain of such answers
    joins them: math-verify's comparison is neither symmetric nor transitive. Equal spellings are joined first, so
    that only different ones are compared. Of several spellings a plain number stands in, and the first one otherwise.

    Args:
        texts: generated texts of one problem.
        style: "hash", "math" or "auto".

    Returns:
        Indices into `texts`; `None` for a text without an answer.
    """
    check_choice("style", style, STYLES)
    answers = [_read(text, style) for text in texts]
    first: dict[str, int] = {}  # spelling -> where it is first seen
    for index, answer in enumerate(answers):
        if answer is not None:
            first.setdefault(answer.spelling, index)
    classes: list[list[int]] = []
    for index in first.values():
        same = [group for group in classes if any(_are_same(answers[index], answers[i], style) for i in group)]
        joined = sorted([index, *(i for group in same for i in group)])
        classes = [group for group in classes if group not in same] + [joined]
    stands = {}
    for group in classes:
        best = next((i for i in group if _is_number(answers[i].spelling)), group[0])
        stands |= {answers[i].spelling: best for i in group}
    return [None if answer is None else stands[answer.spelling] for answer in answers]


@dataclass
class _Answer:
    """An answer as it was read.

    Args:
        spelling: normalised.
        text: what math-verify reads; "" for the style "hash".
        is_plain: marked by `####`, a number or no formula: of all numbers only the same one equals it.
    """

    spelling: str
    text: str
    is_plain: bool = False

    @cached_property
    def parsed(self) -> list:
        return _parse(self.text)


def _read(text: str, style: str) -> _Answer | None:
    if style == "hash":
        answer = hash_answer(text)
        return None if answer is None else _Answer(answer, "")
    if style == "auto" and MARK in text and not _is_heading(text):
        line = text.rpartition(MARK)[2].split("\n", 1)[0].strip()
        answer = normalize(line)
        if not answer:
            return None
        if _is_number(answer) or not (_has_box(line) or _is_formula(line)):
            return _Answer(answer, _anchored(answer), is_plain=True)
        text = _anchored(line)
        marked = _Answer(answer, text)
    else:
        marked = _Answer("", text)
    if marked.parsed:
        marked.spelling = normalize(str(marked.parsed[0]))
    return marked if marked.spelling else None


def _read_gold(gold: str, style: str) -> _Answer:
    """A data set's answer, which may be bare."""
    marked = None if style == "auto" and _is_heading(gold) else hash_answer(gold)
    answer = normalize(gold) if marked is None else marked
    return _Answer(answer, "" if style == "hash" else _anchored(gold if marked is None or style == "math" else marked))


def _is_heading(text: str) -> bool:
    """Whether the last `####` begins a Markdown heading, and the text's answer is in a box."""
    before, mark, rest = text.rpartition(MARK)
    line, _, behind = rest.partition("\n")
    if not mark or _is_number(normalize(line)):
        return False
    if _has_box(behind):
        return True
    return _has_box(before) and bool(behind.strip()) and not _has_box(line)


def _is_right(answer: _Answer, gold: _Answer, style: str) -> bool:
    if style == "hash":
        return answer.spelling == gold.spelling
    if answer.is_plain:
        if answer.spelling == gold.spelling:
            return True
        if _is_number(gold.spelling):
            return False
    from math_verify import verify

    # the order matters: verify(gold, answer) is not symmetric
    return bool(gold.parsed and answer.parsed and verify(gold.parsed, answer.parsed, timeout_seconds=_timeout()))


def _are_same(one: _Answer, other: _Answer, style: str) -> bool:
    if all(re.fullmatch(r"-?\d+", answer.spelling) for answer in (one, other)):
        return one.spelling == other.spelling  # what math-verify says too, in no time
    return _is_right(one, other, style) or _is_right(other, one, style)


def _is_number(answer: str) -> bool:
    answer = answer.strip()
    return bool(_NUMBER.fullmatch(answer)) and any(character.isdigit() for character in answer)


def _is_formula(line: str) -> bool:
    """LaTeX without words between."""
    return bool(_IS_LATEX.search(line)) and not re.search(r"[A-Za-z]{2}", _COMMAND.sub("", line))


def _unwrap(answer: str) -> str:
    """What stands in a `$...$`, `\\boxed{...}` or `**...**` that is around all of an answer."""
    while inside := next(filter(None, (wrapper.fullmatch(answer) for wrapper in _WRAPPERS)), None):
        answer = inside[1].strip()
    return answer


def _join_thousands(text: str) -> str:
    return _GROUPED.sub(lambda number: re.sub(_GAP, "", number[0]), text)


def _has_box(text: str) -> bool:
    return _BOX in _without_open_box(text)


def _without_open_box(text: str) -> str:
    """The text up to a last `\\boxed{` that is not closed."""
    while (start := text.rfind(_BOX)) >= 0:
        depth = 0
        for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                return text
        text = text[:start]
    return text


def _anchored(answer: str) -> str:
    """A bare answer as the formula that math-verify looks for."""
    return answer if _HAS_LATEX_ANCHOR.search(answer) else f"${answer}$"


def _parse(text: str) -> list:
    from math_verify import parse

    return parse(_plain_latex(text), parsing_timeout=_timeout())


def _plain_latex(text: str) -> str:
    """Spellings that math-verify does not read, or not as they are meant, as it reads them."""
    # math-verify takes "72%" for 72 and for 0.72 alike
    text = _without_open_box(text.replace("\\%", "").replace("%", ""))
    text = _SPACED.sub(lambda number: number[0].replace(" ", ""), _join_thousands(text))
    text = re.sub(r"(?<=[A-Za-z}])[²³]", lambda power: "^2" if power[0] == "²" else "^3", text)
    text = re.sub(rf"(?<=[\d}}])\s*~\s*(?={_ROMAN})", " ", text)
    text = re.sub(r"\{\\rm\s+([^{}]*)\}|\\(?:rm|mathsf|textsf)\s*\{([^{}]*)\}", r"\\mathrm{\1\2}", text)
    # these would be products of variables; single letters may be some
    text = _ITALIC_UNIT.sub(r"\1\\mathrm{\2}\3", text)
    return re.sub(r"(?<=[\d}])\.\s*(?=\})", "", text)


def _timeout() -> int | None:
    """math-verify's timeouts are alarms, which exist on the main thread only."""
    return 5 if threading.current_thread() is threading.main_thread() else None
