"""The commands of this package: what each is for, how one starts and ends, and where the scripts of a checkout lie.

Importing it is quick: `s2t --help` needs nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple


#: recipes/ of the checkout that this package is installed from. An installed wheel has none.
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class Command(NamedTuple):
    """A command of `s2t`.

    Attributes:
        module: module whose `main()` it runs.
        purpose: one sentence that says what it is for.
        example: a line that can be typed.
        resumes: whether the same command, after a stop, goes on from what is done. See [`kept`].
    """

    module: str
    purpose: str
    example: str
    resumes: bool = False


#: In the order in which they are used.
COMMANDS = {
    "label": Command(
        "s2t_recipes.labeling.label",
        "Label problems: the small model's texts, its candidates at decision points, the teacher's view of them.",
        "s2t label --model recipes/embedded/student --teacher_model recipes/embedded/teacher "
        "--dataset data/label.jsonl --output_dir labels/train --max_new_tokens 72",
        resumes=True,
    ),
    "train": Command(
        "s2t_recipes.training.train",
        "Train an S2T-Local selector, a LoRA adapter of the small model, on labels.",
        "s2t train --model recipes/embedded/student --labels labels/train --output_dir selector --learning_rate 2e-3",
    ),
    "route": Command(
        "s2t_recipes.training.router",
        "Train a router: a light head that says at which tokens to ask the selector, without a teacher.",
        "s2t route --adapter selector --labels labels/train",
    ),
    "calibrate": Command(
        "s2t_recipes.training.calibrate",
        "Fit the fusion weights and trigger thresholds of a trained selector on held-out training problems.",
        "s2t calibrate --adapter selector --labels labels/calibration",
    ),
    "eval": Command(
        "s2t_recipes.evaluation.run",
        "Compare ways of decoding on the same problems with the same settings, in one table with intervals.",
        "s2t eval --model recipes/embedded/student --teacher_model recipes/embedded/teacher --adapters selector "
        "--dataset data/test.jsonl --output_dir evaluation",
        resumes=True,
    ),
    "report": Command(
        "s2t_recipes.report.report",
        "Draw what `s2t eval` measured: a page with every answer, and pictures.",
        "s2t report evaluation",
    ),
    "imitate": Command(
        "s2t_recipes.training.imitate",
        "Train what a selector has to be compared with: a LoRA adapter of the small model that imitates the teacher.",
        "s2t imitate --method sft --model recipes/embedded/student --teacher_model recipes/embedded/teacher "
        "--labels labels/train --output_dir sft --learning_rate 1e-3",
    ),
    "merge": Command(
        "s2t_recipes.training.merge",
        "Merge a LoRA adapter into its model, so that a selector can be trained on top of the tuned model.",
        "s2t merge --model recipes/embedded/student --adapter sft --output_dir sft-merged",
    ),
    "export": Command(
        "s2t_recipes.training.export",
        "Turn a selector of the paper's form into a plain checkpoint, which writes what the adapted model writes.",
        "s2t export --adapter selector --output_dir checkpoint",
    ),
    "env": Command("s2t_recipes.environment", "Print the versions and devices that a bug report needs.", "s2t env"),
}

#: Scripts without a command: module -> whether the same line, after a stop, goes on from what is done.
SCRIPTS = {
    "s2t_recipes.demo": True,
    "s2t_recipes.paper.run": True,
    "s2t_recipes.evaluation.agreement": False,
    "s2t_recipes.evaluation.retention": False,
    "s2t_recipes.splits": False,
}
RESUMES = "The same command resumes from here."
BEGINS_AGAIN = "Nothing was kept: the same command begins again."


class CommandFailed(RuntimeError):
    """A command could not finish; its message is all that a user needs to know."""


def program() -> str:
    """What the user typed: "s2t train", or the name of a script."""
    return Path(sys.argv[0]).name


def typed_command() -> str:
    """This command as it can be typed again."""
    return shlex.join([*program().split(), *sys.argv[1:]] if program().startswith("s2t ") else ["python", *sys.argv])


def say(message: object) -> None:
    """Prints one line to stderr, behind the program's name."""
    print(f"{program()}: {message}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program on an error that a user can mend: one line. Exit status 2: the input is wrong, or a package is
    missing; 1: the work failed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("s2t_recipes", "transformers_s2t"):
            raise
        say(f"the package {package!r} is not installed: pip install 'transformers-s2t[recipes]'")
        sys.exit(2)
    except (ValueError, OSError, ImportError) as error:
        if getattr(error, "at_work", False):
            raise
        say(error)
        sys.exit(2)
    except CommandFailed as error:
        say(error)
        sys.exit(1)


@contextmanager
def work() -> Iterator[None]:
    """Marks what runs after all input was checked: a ValueError or ImportError in here keeps its traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        error.at_work = True
        raise


@contextmanager
def kept(resumes: Callable[[], bool]) -> Iterator[None]:
    """Lets a command say itself, where it is stopped in here, whether it will go on from what is done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.resumes = resumes()
        raise


def run(main: Callable[[], None] | str) -> None:
    """Entry point of a command.

    Args:
        main: reads `sys.argv`; or the name of the module that has it, so that importing it is part of the command.
    """
    module = main if isinstance(main, str) else main.__module__
    try:
        with one_line_errors():
            if isinstance(main, str):
                main = import_module(main).main
            if {"-h", "--help"}.intersection(sys.argv[1:]):
                print(opening(main.__module__), end="\n\n")
            main()
    except KeyboardInterrupt as stop:
        known = SCRIPTS | {command.module: command.resumes for command in COMMANDS.values()}
        resumes = getattr(stop, "resumes", known.get(module))
        ending = "" if resumes is None else f" {RESUMES if resumes else BEGINS_AGAIN}"
        print(f"\nStopped.{ending}", file=sys.stderr)
        sys.exit(130)


def opening(module: str) -> str:
    """How the `--help` of a module's command begins: what it is for, and an example."""
    for command in COMMANDS.values():
        if command.module == module:
            words = re.sub(r"(--\S+) (?!-)", "\\1\0", command.example)  # no line ends between an option and its value
            lines = textwrap.wrap(words, 100, break_long_words=False, break_on_hyphens=False)
            return f"{command.purpose}\n\n    " + " \\\n        ".join(lines).replace("\0", " ")
    text = sys.modules[module].__doc__ + "\n\n"  # a script that `s2t` has no name for
    example = re.search(r"\n\n {4}.*?\n\n", text, re.DOTALL)
    example = re.sub(" {9}(?=-)", " \\\\\n        ", example[0].rstrip()) if example else ""
    return text.split("\n\n")[0] + example


def recipe(name: str) -> str:
    """Path of a script of recipes/, relative to the working directory if that is shorter."""
    path = RECIPES / name
    return min(os.path.relpath(path), str(path), key=len)
