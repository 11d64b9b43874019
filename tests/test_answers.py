"""recipes/answers.py: what counts as the answer of a text, and as the right one."""

import sys
import threading
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from answers import extract_answer, is_correct, normalize  # noqa: E402


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+1,200.50", "1200.5"),
        ("42.", "42"),
        ("42.00", "42"),
        ("100", "100"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("12,345,678", "12345678"),
        (" 1,2 ", "1,2"),  # no thousands separator
        ("72%", "72%"),
        ("1e5", "1e5"),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 27+8=35 apples.\n#### 35", "35"),
        ("#### 3\nno, wait\n####  1,234.0 ", "1234"),
        ("#### 5\nand more text 9", "5"),
        ("the answer is 42", None),
        ("####", None),
        ("####\n42", None),
        ("", None),
    ],
)
def test_hash_reads_the_last_mark_and_nothing_else(text, expected):
    assert extract_answer(text, "hash") == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("#### 42", "She has 6*7=<<6*7=42>>42 eggs.\n#### 42", True),  # GSM8K's own answers
        ("#### 1200", "#### 1,200", True),
        ("#### 42.0", "42", True),
        ("I get 42", "#### 42", False),  # no fall back to the last number
        ("#### 42 eggs", "42", False),
        ("#### 7200", "72", False),  # no x100
        ("#### 0.72", "72", False),
        ("#### 72%", "0.72", False),
        ("", "42", False),
    ],
)
def test_hash_answers(prediction, gold, right):
    assert is_correct(prediction, gold, "hash") is right


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        ("1/2", r"\frac{1}{2}", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{72\%}", "72", True),
        (r"\boxed{72\%}", "0.72", False),  # math-verify alone takes it for both
        ("the answer is 72%", "0.72", False),
        (r"\boxed{7200}", "72", False),
        (r"\boxed{3}", r"\boxed{4}", False),
        ("", "1", False),
    ],
)
def test_math_answers(prediction, gold, right):
    assert is_correct(prediction, gold, "math") is right


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("so 42", "... #### 42", True),  # a chat model that knows no ####
        ("so 41 #### 42", "... #### 42", True),
        ("so 42 #### 41", "... #### 42", False),
        (r"#### \frac12", r"\frac{1}{2}", True),
        ("x is 4200", "#### 42", False),
    ],
)
def test_auto_answers(prediction, gold, right):
    assert is_correct(prediction, gold, "auto") is right


def test_math_off_the_main_thread():
    """math-verify's own timeouts are alarms, which raise outside the main thread."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(is_correct("1/2", "0.5", "math")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_unknown_style():
    with pytest.raises(ValueError, match="`style` must be one of 'hash', 'math', 'auto', got 'regex'"):
        extract_answer("1", "regex")
    with pytest.raises(ValueError, match="got 'regex'"):
        is_correct("1", "1", "regex")
