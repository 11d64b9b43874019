"""Writes disjoint parts of a data set, one .jsonl each: for labels, tuning, calibration, tests and later rounds.

    python recipes/splits.py --dataset openai/gsm8k:main --output_dir runs/gsm8k/data --label 2000 --test 1000

The part `test` comes from the test split where there is one, everything else from the training split; a hash of a
problem's id and the seed says where it belongs, so other problems change nothing. Knows files and columns, not models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from s2t_recipes.options import SmallParser
from s2t_recipes.problems import SUFFIXES, Problem, load_problems, read_rows, split_by_id
from transformers_s2t.files import atomic_write


PROBLEM_PARTS = ("label", "tuning", "calibration", "test", "fresh")
CORPUS_PARTS = (*PROBLEM_PARTS, "words")  # words: text that is no problem, which a corpus.py may write
PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution")


def has_corpus_script(dataset: str) -> bool:
    """Whether a data set is a folder with a corpus.py, which writes its problems (recipes/embedded)."""
    return (Path(dataset) / "corpus.py").is_file()


def split_command(
    recipe: str, dataset: str, output_dir: str, sizes: Mapping[str, int], seed: int, options: list[str] | None = None
) -> list[str]:
    """The command that writes the parts: `recipe`, the path of splits.py, or the data set's own corpus.py.

    Args:
        recipe, dataset, output_dir, seed: path of splits.py, and what it takes.
        sizes: part -> number of problems.
        options: more arguments, those of corpus.py.
    """
    sign, start = "--", [recipe, "--dataset", dataset, "--output_dir", output_dir]
    if has_corpus_script(dataset):
        sign, start = "--num-", [f"{dataset}/corpus.py", "--output", output_dir]
    counts = [text for name, size in sizes.items() for text in (f"{sign}{name}", str(size))]
    return [*start, "--seed", str(seed), *counts, *(options or [])]


def load_split(source: str, split: str | None) -> list[Problem]:
    """The problems of a split, from columns with the usual names.

    Raises:
        ValueError: where no column has one.
    """
    names, found = next(iter(read_rows(source, split)), {}), {}
    for what, usual in (("prompt", PROMPT_COLUMNS), ("answer", ANSWER_COLUMNS)):
        found[f"{what}_column"] = next((name for name in usual if name in names), None)
        if found[f"{what}_column"] is None:
            raise ValueError(f"`dataset`: no {what} column named {' or '.join(usual)}; columns there: {list(names)}.")
    return load_problems(source, split, **found)


def divide(source: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[Problem]]:
    """Disjoint parts of a data set, as large as it allows, and in proportion where it is too small.

    A single file, or a data set without a test split, gives its part `test` from itself.

    Args:
        source: as in [`load_problems`].
        sizes: part -> problems at most.
        seed: another one gives another division.

    Raises:
        ValueError: where nothing is left for a part.
    """
    folder = Path(source)
    files = [file for file in folder.glob("*") if file.suffix in SUFFIXES]
    only = str(files[0]) if len(files) == 1 else source if folder.is_file() else None
    if only is not None:
        train, test = load_split(only, None), None
    else:
        train = load_split(source, "train")
        try:
            test = load_split(source, "test")
        except FileNotFoundError:
            test = None
    if test is not None:
        tested = {problem.id for problem in test}
        train = [problem for problem in train if problem.id not in tested]
    divided = {name: size for name, size in sizes.items() if name != "test" or test is None}
    total = sum(divided.values())
    parts = split_by_id(train, {name: size / total for name, size in divided.items()}, seed)
    if test is not None:
        parts["test"] = test
    parts = {name: parts[name][:size] for name, size in sizes.items()}
    empty = [name for name in parts if not parts[name]]
    if empty:
        raise ValueError(
            f"`dataset`: {source!r} is too small to be divided: no problem is left for {', '.join(empty)} "
            f"({len(train)} problems to divide)."
        )
    return parts


def write_problems(file: Path, problems: list[Problem]) -> None:
    lines = [json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer}, ensure_ascii=False) for p in problems]
    with atomic_write(file) as out:
        out.write(("\n".join(lines) + "\n").encode("utf-8"))


def main() -> None:
    parser = SmallParser("What is divided, and into what")
    parser.add_argument("--dataset", required=True, help="Hub id, folder with train and test files, or one file.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the .jsonl files.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the division.")
    for name in PROBLEM_PARTS:
        parser.add_argument(f"--{name}", type=int, default=0, help=f"Number of problems of {name}.jsonl.")
    text = "Part that is written alone, divided as with all (default: all are written)."
    parser.add_argument("--only", choices=PROBLEM_PARTS, help=text)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in PROBLEM_PARTS}
    if min(sizes.values()) < 0 or not any(sizes.values()) or sizes.get(args.only) == 0:
        parser.error(f"the sizes must be 0 or more, and one of them, or that of --only, above 0, got {sizes}")
    parts = divide(args.dataset, {name: size for name, size in sizes.items() if size}, args.seed)
    for name, problems in parts.items():
        if args.only not in (None, name):
            continue
        write_problems(args.output_dir / f"{name}.jsonl", problems)
        print(f"{args.output_dir / f'{name}.jsonl'}: {len(problems)} problems")
