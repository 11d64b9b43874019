"""The grammar of the embedded pair: word problems, two ways of writing their solutions, disjoint splits.

A problem tells a chain of two or three steps on one quantity, which stays within 1-99 all along:

    Tom has 27 apples. Tom finds 8. Ann has 5 fewer than Tom. How many apples does Ann have?

A *clean* solution (what the teacher learns) is

    So 27+8=35 apples.
    So 35-5=30 apples.
    #### 30

A *sloppy* solution (what the student learns) is written by a hidden author, careful (35 %) or sloppy (65 %), who
commits misconceptions with the probabilities of `AUTHORS`. After 20 % of the errors the author doubts: a `?` follows
the wrong token at once, then comes the right token, and the solution goes on from there: `27+8=2?35`, `35+?-5=30`,
`3*10?2=36`. So the state behind a wrong token has to know that it is wrong, and which token would be right.

Nothing but the decisions is uncertain: the connector (`So`) is the first token of a solution and stays the same on
every line of it, the noun is the one of the problem.

This file knows text only: no tokens, no models. Run it to write the splits:

    python recipes/embedded/corpus.py --output data/embedded
    python recipes/embedded/corpus.py --output data/seen --without dozen takes
    python recipes/embedded/corpus.py --output data/held-out --only-with dozen takes
"""

import argparse
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


NAMES = (
    ("Tom", "Ann", "Ben", "Eva", "Max", "Lea", "Sam", "Mia")
    + ("Leo", "Zoe", "Tim", "Ida", "Jon", "Amy", "Rob", "Kim")
)  # fmt: skip
NOUNS = (
    ("apples", "pears", "plums", "nuts", "eggs", "coins", "cards", "books", "pens", "cups")
    + ("shells", "stones", "beads", "balls", "stamps", "flowers", "leaves", "boxes", "bags", "keys")
)  # fmt: skip
ADD_VERBS = ("finds", "buys", "gets")
SUB_VERBS = ("loses", "sells", "drops")
CONNECTORS = ("So", "Then", "Thus", "Now")
CONNECTOR_WEIGHTS = (88, 4, 4, 4)

MIN_VALUE, MAX_VALUE = 1, 99
OPERANDS = range(2, 10)
START_WEIGHTS = {"has": 70, "dozen": 15, "weeks": 15}
EVENT_WEIGHTS = {"add": 24, "sub": 18, "more": 14, "fewer": 20, "twice": 10, "takes": 14}
STEP_WEIGHTS = {2: 60, 3: 40}
UNIT = {"dozen": 12, "weeks": 7}

RIGHT_OPERATOR = {"add": "+", "sub": "-", "more": "+", "fewer": "-", "twice": "*", "takes": "-"}
# Misconceptions, by the token in which they show: the operator, the second factor, the result.
WRONG_OPERATOR = {"fewer": "+", "more": "-", "twice": "+", "takes": "+"}
WRONG_UNIT = {"dozen": 10, "weeks": 5}

OFTEN, SOMETIMES = ("carry", "fewer", "dozen"), ("borrow", "more", "weeks", "twice", "takes")
KINDS = OFTEN + SOMETIMES
AUTHORS = {
    "clean": {},
    "careful": {**dict.fromkeys(KINDS, 0.10), "slip": 0.01},
    "sloppy": {**dict.fromkeys(OFTEN, 0.85), **dict.fromkeys(SOMETIMES, 0.50), "slip": 0.01},
}
SLOPPY_SHARE = 0.65
DOUBT_RATE = 0.20

WORDS = "words"  # no split: see build_words
# Per cent of all problems, by the hash of the canonical key. Every problem belongs to exactly one split.
SPLIT_SHARES = {"pretrain": 65, "label": 15, "tuning": 5, "calibration": 5, "test": 5, "fresh": 5}


@dataclass(frozen=True)
class Event:
    """One step: `kind` is a key of `EVENT_WEIGHTS`; `sentence` tells it."""

    kind: str
    operand: int
    sentence: str


@dataclass(frozen=True)
class Problem:
    """A start, its events and the words around them. `start_number` counts things, dozens or weeks."""

    start: str
    start_number: int
    start_sentence: str
    events: tuple[Event, ...]
    noun: str
    last_holder: str

    @property
    def prompt(self) -> str:
        story = " ".join([self.start_sentence, *(event.sentence for event in self.events)])
        return f"{story} How many {self.noun} does {self.last_holder} have?\n"


@dataclass(frozen=True)
class Solution:
    """A written solution. `decisions` holds (kind, outcome), the outcome being right, wrong or doubt."""

    text: str
    answer: str
    decisions: tuple[tuple[str, str], ...]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def compute(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def chain_fits(value: int, events: tuple[Event, ...]) -> bool:
    """Whether `value` and all values that follow from it, by right steps, stay within 1-99."""
    for event in events:
        if not MIN_VALUE <= value <= MAX_VALUE:
            return False
        value = compute(value, RIGHT_OPERATOR[event.kind], event.operand)
    return MIN_VALUE <= value <= MAX_VALUE


def forgetful_result(left: int, operator: str, right: int) -> tuple[str, int] | None:
    """The result of forgetting the carry or the borrow, as (kind, result); None where there is neither."""
    if operator == "+" and left % 10 + right >= 10:
        return "carry", left + right - 10
    if operator == "-" and left % 10 < right:
        return "borrow", left - right + 10
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def draw(rng: random.Random, weights: dict) -> str | int:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def draw_event(rng: random.Random, holder: str, others: list[str]) -> tuple[Event, str]:
    """One event on what `holder` has, and who holds the quantity afterwards."""
    kind = draw(rng, EVENT_WEIGHTS)
    operand = 2 if kind == "twice" else rng.choice(OPERANDS)
    if kind == "add":
        return Event(kind, operand, f"{holder} {rng.choice(ADD_VERBS)} {operand}."), holder
    if kind == "sub":
        return Event(kind, operand, f"{holder} {rng.choice(SUB_VERBS)} {operand}."), holder
    other = others.pop()
    if kind == "takes":
        return Event(kind, operand, f"{other} takes {operand} from {holder}."), holder
    if kind == "twice":
        return Event(kind, operand, f"{other} has twice as many as {holder}."), other
    return Event(kind, operand, f"{other} has {operand} {kind} than {holder}."), other


def draw_problem(rng: random.Random) -> Problem:
    while True:
        holder, *others = rng.sample(NAMES, 4)
        noun = rng.choice(NOUNS)
        start = draw(rng, START_WEIGHTS)
        num_events = draw(rng, STEP_WEIGHTS)
        if start == "has":
            start_number = value = rng.randint(2, 90)
            sentence = f"{holder} has {start_number} {noun}."
        else:
            num_events -= 1
            start_number = rng.choice(OPERANDS)
            value = start_number * UNIT[start]
            sentence = f"{holder} has {start_number} dozen {noun}."
            if start == "weeks":
                sentence = f"{holder} gets {noun} for {start_number} weeks, one a day."
        events = []
        for _ in range(num_events):
            event, holder = draw_event(rng, holder, others)
            events.append(event)
        if chain_fits(value, tuple(events)):
            return Problem(start, start_number, sentence, tuple(events), noun, holder)


# ---------------------------------------------------------------------------------------------------------------------
# Solutions


class Author:
    """Draws what an author does at each decision and keeps the record of it."""

    def __init__(self, name: str, rng: random.Random):
        if name not in AUTHORS:
            raise ValueError(f"`name` must be one of {sorted(AUTHORS)}, got {name!r}")
        self.rates = AUTHORS[name]
        self.rng = rng
        self.decisions: list[tuple[str, str]] = []

    def decide(self, kind: str, wrong_fits: bool) -> str:
        """right, wrong or doubt. Where the error would leave 1-99 there is nothing to decide."""
        if kind not in self.rates or not wrong_fits:
            return "right"
        outcome = "right"
        if self.rng.random() < self.rates[kind]:
            outcome = "doubt" if self.rng.random() < DOUBT_RATE else "wrong"
        self.decisions.append((kind, outcome))
        return outcome


def render(right: str, wrong: str, outcome: str) -> str:
    """The text of a decision. In doubt the author breaks off behind the first wrong token: ("35", "25") -> "2?35"."""
    if outcome != "doubt":
        return right if outcome == "right" else wrong
    same = len(os.path.commonprefix([right, wrong]))
    return wrong[: same + 1] + "?" + right[same:]


def write_result(author: Author, left: int, operator: str, right: int, rest: tuple[Event, ...]) -> tuple[str, int]:
    """The text behind `=` and the value with which the author goes on."""
    result = compute(left, operator, right)
    forgetful = forgetful_result(left, operator, right)
    if forgetful is not None:
        kind, wrong = forgetful
        outcome = author.decide(kind, chain_fits(wrong, rest))
        if outcome != "right":
            return render(str(result), str(wrong), outcome), wrong if outcome == "wrong" else result
    digits = list(str(result))
    place = author.rng.randrange(len(digits))
    digits[place] = author.rng.choice([digit for digit in "123456789" if digit != digits[place]])
    wrong = int("".join(digits))
    outcome = author.decide("slip", chain_fits(wrong, rest))
    return render(str(result), str(wrong), outcome), wrong if outcome == "wrong" else result


def write_solution(problem: Problem, rng: random.Random, author_name: str) -> Solution:
    """Writes the solution as `author_name` ("clean", "careful" or "sloppy") would."""
    author = Author(author_name, rng)
    connector = CONNECTORS[0] if author_name == "clean" else rng.choices(CONNECTORS, CONNECTOR_WEIGHTS)[0]
    lines = []

    def add_line(calculation: str) -> None:
        lines.append(f"{connector} {calculation} {problem.noun}.")

    value = problem.start_number
    if problem.start != "has":
        unit, wrong_unit = UNIT[problem.start], WRONG_UNIT[problem.start]
        outcome = author.decide(problem.start, chain_fits(value * wrong_unit, problem.events))
        factor = wrong_unit if outcome == "wrong" else unit
        text, result = write_result(author, value, "*", factor, problem.events)
        add_line(f"{value}*{render(str(unit), str(wrong_unit), outcome)}={text}")
        value = result
    for index, event in enumerate(problem.events):
        rest = problem.events[index + 1 :]
        operator = shown = RIGHT_OPERATOR[event.kind]
        if event.kind in WRONG_OPERATOR:
            wrong = WRONG_OPERATOR[event.kind]
            outcome = author.decide(event.kind, chain_fits(compute(value, wrong, event.operand), rest))
            shown = render(operator, wrong, outcome)
            operator = wrong if outcome == "wrong" else operator
        text, result = write_result(author, value, operator, event.operand, rest)
        add_line(f"{value}{shown}{event.operand}={text}")
        value = result
    lines.append(f"#### {value}")
    return Solution("\n".join(lines), str(value), tuple(author.decisions))


def clean_solution(problem: Problem) -> Solution:
    return write_solution(problem, random.Random(0), "clean")


def sloppy_solution(problem: Problem, rng: random.Random) -> Solution:
    return write_solution(problem, rng, "sloppy" if rng.random() < SLOPPY_SHARE else "careful")


def parse_answer(text: str) -> str | None:
    """What follows the last `####` line, read strictly: one or two digits and nothing else; None otherwise."""
    marked = [line for line in text.split("\n") if line.startswith("####")]
    match = re.fullmatch(r"#### ([1-9][0-9]?)", marked[-1]) if marked else None
    return match.group(1) if match else None


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of misconceptions


def kinds_of(problem: Problem) -> frozenset[str]:
    """The `KINDS` of misconceptions that the clean solution passes by.

    By what a problem asks for, not by what an author may write: 5+5=10 has a carry, though 5+5=0 would leave 1-99.
    Behind an error the values change: there a carry or a borrow can come up that the clean solution does not have.
    """
    kinds = {problem.start, *(event.kind for event in problem.events)} & set(KINDS)
    value = problem.start_number * UNIT.get(problem.start, 1)
    for event in problem.events:
        operator = RIGHT_OPERATOR[event.kind]
        forgetful = forgetful_result(value, operator, event.operand)
        if forgetful is not None:
            kinds.add(forgetful[0])
        value = compute(value, operator, event.operand)
    return frozenset(kinds)


@dataclass(frozen=True)
class KindFilter:
    """Keeps problems with no kind of `without` and, unless it is empty, at least one of `only_with`.

    Raises:
        ValueError: naming an unknown kind and the legal ones, or a kind that is asked for and shut out.
    """

    without: frozenset[str] = frozenset()
    only_with: frozenset[str] = frozenset()

    def __post_init__(self):
        for name in ("without", "only_with"):
            unknown = sorted(getattr(self, name) - set(KINDS))
            if unknown:
                raise ValueError(f"`{name}` must be among {list(KINDS)}, got {unknown}")
        both = sorted(self.without & self.only_with)
        if both:
            raise ValueError(f"`without` and `only_with` must not share kinds, got {both} in both")

    def keeps(self, problem: Problem) -> bool:
        kinds = kinds_of(problem)
        return not kinds & self.without and (not self.only_with or bool(kinds & self.only_with))


ALL_KINDS = KindFilter()


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def canonical_key(prompt: str) -> str:
    """The text of a prompt with names numbered by appearance and nouns and synonymous verbs made equal.

    Two prompts that differ in such words only share the key, hence the split: no split is a rewording of another.
    """
    roles: dict[str, str] = {}
    words = []
    for word in re.findall(r"\w+|\W", prompt):
        if word in NAMES:
            word = roles.setdefault(word, f"<name {len(roles)}>")
        elif word in NOUNS:
            word = "<noun>"
        elif word in ADD_VERBS:
            word = "<add>"
        elif word in SUB_VERBS:
            word = "<sub>"
        words.append(word)
    return "".join(words)


def split_of(prompt: str) -> str:
    """The one split to which the prompt belongs, whatever the seed."""
    bucket = int(hashlib.sha256(canonical_key(prompt).encode()).hexdigest(), 16) % 100
    for name, share in SPLIT_SHARES.items():
        if bucket < share:
            return name
        bucket -= share
    raise AssertionError("the shares of the splits must sum to 100")


def problem_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def iter_problems(name: str, seed: int, kinds: KindFilter = ALL_KINDS) -> Iterator[Problem]:
    """The problems of one split without duplicates, endless for practical purposes.

    A filter leaves problems out and changes nothing else: neither their order, nor their ids, nor their split.
    """
    if name not in SPLIT_SHARES:
        raise ValueError(f"`name` must be one of {list(SPLIT_SHARES)}, got {name!r}")
    rng = random.Random(f"{name} {seed}")
    seen = set()
    while True:
        problem = draw_problem(rng)
        if problem.prompt not in seen and split_of(problem.prompt) == name and kinds.keeps(problem):
            seen.add(problem.prompt)
            yield problem


def build_problems(name: str, num_problems: int, seed: int, kinds: KindFilter = ALL_KINDS) -> list[Problem]:
    if num_problems < 1:
        raise ValueError(f"`num_problems` must be at least 1, got {num_problems}")
    return [problem for _, problem in zip(range(num_problems), iter_problems(name, seed, kinds), strict=False)]


def build_split(name: str, num_problems: int, seed: int, kinds: KindFilter = ALL_KINDS) -> list[dict[str, str]]:
    """Rows with `id` (of the prompt's text), `prompt`, `answer` and `solution` (the clean one)."""
    rows = []
    for problem in build_problems(name, num_problems, seed, kinds):
        solution = clean_solution(problem)
        prompt = problem.prompt
        rows.append({"id": problem_id(prompt), "prompt": prompt, "answer": solution.answer, "solution": solution.text})
    return rows


def build_words(num_lines: int, seed: int) -> list[dict[str, str]]:
    """Rows with a `prompt` of 30 words of the grammar in any order: text that is no problem, of nothing unknown.

    The first is a name: no other word is a token without a space in front of it.
    """
    if num_lines < 1:
        raise ValueError(f"`num_lines` must be at least 1, got {num_lines}")
    rng = random.Random(f"words {seed}")
    words = (*NAMES, *NOUNS, *ADD_VERBS, *SUB_VERBS)
    return [{"prompt": " ".join([rng.choice(NAMES), *rng.choices(words, k=29)])} for _ in range(num_lines)]


def write_jsonl(rows: list[dict], path: Path) -> None:
    """Writes all rows or nothing: a temporary file that is renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the splits of the embedded problems as JSON lines.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="which problems of each split (default: 0)")
    sizes = {"label": 500, "tuning": 300, "calibration": 300, "test": 500, "fresh": 0}
    for name, number in sizes.items():
        parser.add_argument(
            f"--num-{name}", type=int, default=number, help=f"problems of {name}.jsonl, 0 for none (default: {number})"
        )
    parser.add_argument("--only", choices=[*sizes, WORDS], help="write this split alone (default: all)")
    parser.add_argument(f"--num-{WORDS}", type=int, default=0, help="lines of words.jsonl, 0 for none (default: 0)")
    for name, help in {"without": "leave out problems with", "only-with": "leave out problems without"}.items():
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar="KIND", help=f"{help} any of these: {', '.join(KINDS)}"
        )
    args = parser.parse_args()
    try:
        kinds = KindFilter(frozenset(args.without), frozenset(args.only_with))
    except ValueError as error:
        parser.error(str(error))
    numbers = {name: getattr(args, f"num_{name}") for name in (*sizes, WORDS)}
    if min(numbers.values()) < 0 or numbers.get(args.only) == 0:
        parser.error(f"sizes must be 0 or more, and above 0 for the one of --only, got {numbers}")
    for name, number in numbers.items():
        if number == 0 or args.only not in (None, name):
            continue
        rows = build_words(number, args.seed) if name == WORDS else build_split(name, number, args.seed, kinds)
        write_jsonl(rows, args.output / f"{name}.jsonl")
        print(f"{args.output / f'{name}.jsonl'}: {len(rows)} problems")


if __name__ == "__main__":
    main()
