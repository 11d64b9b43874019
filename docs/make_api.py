"""Writes docs/api.md: the public names of `transformers_s2t`, from their docstrings, and the commands of `s2t`.

    python docs/make_api.py

tests/test_api.py checks that the committed page is what this script makes.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from textwrap import dedent

import transformers_s2t
from s2t_recipes.commands import COMMANDS


PAGE = Path(__file__).with_name("api.md")
#: In the order in which one meets them.
NAMES = (
    *("S2T", "s2t_generate", "S2TLogitsProcessor", "S2TDecodingConfig", "FusionWeights", "S2TTrace"),
    *("TeacherSelector", "LocalSelector", "SelectorConfig", "Selector", "Router"),
    *("S2TTrainer", "S2TConfig"),
)
INTRODUCTION = """# API reference

Made by `python docs/make_api.py` from the docstrings. Capital letters at the end of a name are its dimensions: `B`
rows, `A` rows whose selector is asked, `K` candidates, `T` tokens, `V` vocabulary, `D` hidden size. Log-probabilities
and divergences are in nats. The [concepts](concepts.md) explain the words."""
_SECTION = re.compile(r"(Args|Attributes|Example|Parameters.*|Raises|Returns|Warns|Yields):")
_ENTRY = re.compile(r"([\w*]+(?:, [\w*]+)*)(?: \((.+?)\))?: (.*)")
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
_WIDTH = 100


def page() -> str:
    parts = [INTRODUCTION]
    for name in NAMES:
        thing = getattr(transformers_s2t, name)
        parts += [f"## `{name}`", *described(name, thing)]
        for method, member in vars(thing).items() if inspect.isclass(thing) else ():
            # the function in a property, class method or static method
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if method[0] != "_" and inspect.isfunction(function) and function.__doc__:
                is_property = isinstance(member, property)
                parts += [f"### `{name}.{method}`", *described("" if is_property else method, function)]
    rows = [f"| `s2t {name}` | {command.purpose} |" for name, command in COMMANDS.items()]
    parts += [
        "## Commands",
        "`s2t COMMAND --help` lists the options of a command.",
        "| command | purpose |\n|---|---|",
    ]
    return "\n\n".join(parts) + "\n" + "\n".join(rows) + "\n"


def described(name: str, thing: Callable) -> Iterator[str]:
    """Signature and docstring in Markdown; no signature where `name` is empty."""
    if name:
        yield f"```text\n{signature(name, thing)}\n```"
    yield from markdown(inspect.cleandoc(thing.__doc__))


def signature(name: str, thing: Callable) -> str:
    """A call with all parameters, their types and defaults; those that a dataclass inherits are left out."""
    found = inspect.signature(thing)
    own = thing.__annotations__ if is_dataclass(thing) else found.parameters
    parts = []
    for key, parameter in found.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if key in own and key not in ("self", "cls"):
            # annotations are strings, and dataclasses do not show mutable defaults
            parts.append(re.sub(r": '(.*?)'", r": \1", str(parameter), count=1).replace("<factory>", "..."))
    if len(own) < len(found.parameters):
        parts.append("**training_arguments")
    returned = "" if found.return_annotation in (found.empty, None) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= _WIDTH else f"{name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){returned}"


def markdown(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, and its sections as lists."""
    for block in text.split("\n\n"):
        title, _, body = block.partition("\n")
        body = dedent(body)
        if not _SECTION.fullmatch(title):
            yield linked(block)
        elif title == "Example:":
            yield f"{title}\n\n```text\n{body}\n```"
        else:
            yield f"**{title.removesuffix(':')}**\n\n" + "\n".join(map(entry, re.split(r"\n(?! )", body)))


def entry(text: str) -> str:
    """One entry of a section: `name (type): what it is`, or a sentence."""
    text = linked(re.sub(r"\s*\n\s*", " ", text))
    if (match := _ENTRY.fullmatch(text)) is None:
        return text
    names, kind, what = match.groups()
    return f"- `{names.replace(', ', '`, `')}`{f' ({kind})' if kind else ''}: {what}"


def linked(text: str) -> str:
    """References to public names become links, others code."""

    def target(match: re.Match) -> str:
        return f"[`{match[1]}`](#{match[1].lower()})" if match[1] in NAMES else f"`{match[1]}`"

    return _REFERENCE.sub(target, text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
