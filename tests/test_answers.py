"""recipes/answers.py: what counts as the answer of a text, and as the right one."""

import threading

import pytest

from s2t_recipes.answers import STYLES, extract_answer, is_correct, normalize, stand_ins


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


@pytest.mark.parametrize("style", ["hash", "auto"])
@pytest.mark.parametrize(
    "line", [r"\boxed{42}", "$42$", "$42$.", r"$\boxed{42}$", r"\(42\)", r"\[ 42.0 \]", "**42**", "**$42$**", "$$42$$"]
)
def test_a_marked_number_may_be_wrapped(line, style):
    """`#### \boxed{42}` was wrong where the data set's answer was a number, and right where it was a formula."""
    for gold in ("42", "6*7=42\n#### 42", r"\boxed{42}", "$42$"):
        if style == "auto" or gold != r"\boxed{42}":
            assert is_correct(f"6*7=42\n#### {line}", gold, style)
    assert extract_answer(f"#### {line}", style) == "42"
    assert not is_correct(f"#### {line}", "43", style)


@pytest.mark.parametrize(
    ("line", "gold", "right"),
    [
        (r"\frac{84}{2}", "42", True),
        (r"$6 \cdot 7$", "42", True),
        (r"Answer: \boxed{42}", "42", True),
        ("Answer: $42$", "42", False),  # words, as in "42 eggs"
        ("Step 3: so $x = 42$", "42", False),
        ("42 eggs", "42", False),
        (r"5 million", "5", False),
        (r"\boxed{4200}", "42", False),
    ],
)
def test_a_marked_formula_is_mathematics(line, gold, right):
    assert is_correct(f"#### {line}", gold, "auto") is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 1: multiply\n6*7=42\nso \\boxed{42}", "42"),
        ("#### Step 1\n\\boxed{5}\n#### **Step 2**\nso $\\boxed{42}$.", "42"),
        ("####\n\\boxed{42}", "42"),
        ("so \\boxed{42}\n#### Check\n42/7=6", "42"),
        ("\\boxed{41}\n#### 42", "42"),  # an answer, no heading
        ("#### 42\n\\boxed{41}", "42"),
        ("#### \\boxed{42}\n6*7", "42"),
        ("\\boxed{41}, said\n#### Evelyn", "Evelyn"),  # nothing behind it: no heading
        ("#### Step 1: multiply\n6*7=42", "Step 1: multiply"),  # no box
        ("#### Step 1: multiply\nso \\boxed{42", "Step 1: multiply"),  # nor one that is closed
    ],
)
def test_a_heading_does_not_hide_a_box(text, answer):
    assert extract_answer(text, "auto") == answer
    if answer == "42":
        for gold in ("42", "... #### 42", text):
            assert is_correct(text, gold, "auto")
            assert not is_correct("41", gold, "auto")


GAPS = [r"\,", r"\ ", r"\;", r"\:", r"\!", r",\!", "{,}", r"{\,}", "~", r" \, ", r"\thinspace ", " ", "\u202f", ","]


@pytest.mark.parametrize("gap", GAPS)
def test_thousands_are_set_apart(gap):
    """`8\\,000` was the product 8*0: never 8000, and 0 where the answer was 0."""
    number = f"8{gap}000"
    for text, styles in ((rf"\boxed{{{number}}}", ("math", "auto")), (f"#### {number}", ("hash", "auto"))):
        for style in styles:
            assert extract_answer(text, style) == "8000"
            assert is_correct(text, "8000", style) and not is_correct(text, "0", style)
            assert not is_correct(text, "8", style)
    for style in STYLES:
        assert is_correct("#### 8000", number if style == "auto" else f"#### {number}", style)
    assert is_correct(rf"\boxed{{-12{gap}345{gap}678.5}}", "-12345678.5", "math")


def test_what_is_no_thousands():
    assert extract_answer(r"#### 8\,00", "hash") == r"8\,00"
    assert not is_correct(r"\boxed{1\,2345}", "12345", "math")
    assert is_correct(r"\boxed{(1,\ 200)}", "(1, 200)", "math")
    assert not is_correct(r"\boxed{x^2\,100}", "x^{2100}", "math")


UNITS = [
    r"\mathrm{cm}^2",
    r"\,\mathrm{cm}^2",
    r"~\mathrm{cm}^{2}",
    r"\ \text{cm}^3",
    r"\mathrm{~m/s}",
    r"\,\mathrm{m}^2.",
]


@pytest.mark.parametrize("unit", UNITS)
def test_units_in_roman_type(unit):
    for style in STYLES:
        assert is_correct(f"#### 24{unit}", "#### 24", style)
        assert not is_correct(f"#### 24{unit}", "#### 25", style)
        assert is_correct("#### 24", f"#### 24{unit}", style)
    assert extract_answer(rf"\boxed{{24{unit}}}", "math") == "24"
    assert (
        extract_answer(rf"\boxed{{1\,024{unit}}}", "math") == extract_answer(rf"#### 1\,024{unit}", "hash") == "1024"
    )


@pytest.mark.parametrize(
    "unit", [r"\,{\rm cm}^2", r"\,\mathsf{cm}^2", r"\,\mathrm{cm}²", " cm^2", " cm²", r"\,km^{2}"]
)
def test_units_in_other_types(unit):
    assert extract_answer(rf"\boxed{{24{unit}}}", "math") == "24"


def test_what_is_no_unit():
    assert not is_correct(r"#### 5 \text{ million}", "5", "hash")
    assert not is_correct(r"#### 42 eggs", "42", "hash")
    assert not is_correct(r"\boxed{24 c^2}", "24", "math")
    assert is_correct(r"\boxed{2m^2}", "2 m^2", "math") and not is_correct(r"\boxed{2m^2}", "2", "math")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}. Wait, \boxed{43", "42"),
        (r"so $\boxed{\frac{1}{2}}$, that is $\boxed{\frac{4}{5", "1/2"),
        (r"so \boxed{42}. Wait: 43, 44, \boxed{4\text{", "42"),
        (r"\boxed{42} \boxed{1} \boxed{", "1"),
        (r"\boxed{43", None),
        (r"so $\boxed{43$", None),
        (r"\boxed{\frac{1}{2} and then \boxed{3}", "3"),  # the last one is closed
    ],
)
def test_a_box_that_is_not_closed_is_none(text, answer):
    for style in ("math", "auto"):
        found = extract_answer(text, style)
        assert found == answer or (answer == "1" and found == "{1, 42}")  # math-verify joins neighbouring boxes


def test_a_gold_price_can_be_read():
    assert is_correct(r"\boxed{42}", r"\$42", "math")


# ---------------------------------------------------------------------------------------------------------------------
# Votes


@pytest.mark.parametrize(
    ("style", "texts", "expected"),
    [
        ("math", [r"\boxed{3}", r"\boxed{3}", r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}", r"\boxed{2\sqrt2}"], "00222"),
        ("auto", [r"#### \sqrt{8}", "#### 3", r"so \boxed{2\sqrt2}", "#### 3.0", r"\boxed{\frac62}"], "01011"),
        ("auto", ["#### 42", r"\boxed{42}", "#### $42$", "#### Step 1: go\n\\boxed{42}", "42"], "00000"),
        ("auto", ["#### 42 eggs", "#### 42", "41"], "012"),
        ("math", [r"\boxed{x=42}", r"\boxed{42}", "nothing", ""], "11--"),  # a number stands in for what equals it
        ("math", [r"\boxed{0.5}", "1/2", r"\boxed{\frac12}", r"\boxed{50\%}"], "0003"),
        # verify(gold, answer) takes 1 < x < 2 as gold for the interval, and not the reverse
        ("math", [r"\boxed{1<x<2}", r"\boxed{(1,2)}"], "00"),
        ("math", [r"\boxed{0.33333}", r"\boxed{3}", r"\boxed{\frac13}", r"\boxed{0.3333333}"], "0133"),
        ("math", [r"\boxed{x=42}", r"\boxed{y=42}"], "01"),
        ("math", [r"\boxed{x=42}", r"\boxed{y=42}", r"\boxed{42}"], "222"),  # a chain joins them
        (
            "hash",
            ["#### 1,200", "#### 1200.0", r"#### 1\,200", "#### 1201", "1200", r"#### \frac12", "#### 0.5"],
            "0003-56",
        ),
    ],
)
def test_what_is_equal_stands_together(style, texts, expected):
    found = stand_ins(texts, style)
    assert "".join("-" if index is None else str(index) for index in found) == expected


def test_what_is_correct_by_another_votes_with_it():
    """The rule itself, on all pairs."""
    texts = [r"\boxed{42}", "#### 42", "#### 42 eggs", r"\boxed{x=42}", r"\boxed{\sqrt8}", r"\boxed{2.828427}", "42.0"]
    texts += ["#### Evelyn", r"\boxed{\text{Evelyn}}", r"\boxed{(1,2)}", r"\boxed{1<x<2}", r"#### 8\,000", "#### 8000"]
    for style in STYLES:
        stands = stand_ins(texts, style)
        for one, by_one in zip(texts, stands):
            for other, by_other in zip(texts, stands):
                if by_one is not None and by_other is not None and is_correct(one, other, style):
                    assert by_one == by_other, (style, one, other)


def test_equal_texts_are_compared_once(monkeypatch):
    from s2t_recipes import answers

    calls = []
    monkeypatch.setattr(answers, "_is_right", lambda *arguments: calls.append(arguments) or False)
    texts = [r"\boxed{3}", r"\boxed{4}", r"\boxed{x}", r"\boxed{ 4 }", r"\boxed{x}"] * 8
    assert stand_ins(texts, "math")[:5] == [0, 1, 2, 1, 2]
    assert len(calls) == 4  # x with 3 and with 4, either way; two integers need no comparison


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
