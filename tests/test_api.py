"""docs/api.md: it is what docs/make_api.py makes, of every public name and command."""

import runpy
from pathlib import Path

import pytest

import transformers_s2t
from s2t_recipes.commands import COMMANDS


DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "make_api.py"), run_name="make_api")


def test_the_page_is_what_the_script_makes(script):
    assert (DOCS / "api.md").read_text(encoding="utf-8") == script["page"](), "run `python docs/make_api.py`"


def test_the_page_has_every_public_name_and_command(script):
    assert sorted(script["NAMES"]) == sorted(transformers_s2t.__all__)
    headings = [line for line in script["page"]().splitlines() if line.startswith("## `")]
    assert headings == [f"## `{name}`" for name in script["NAMES"]]
    assert all(f"| `s2t {name}` | {command.purpose} |" in script["page"]() for name, command in COMMANDS.items())


class Example:
    """One sentence about [`S2T`] and [`~torch.Tensor`].

    Args:
        first, second (`int`): two numbers, of which
            the second is larger.

    Raises:
        ValueError: otherwise.

    The end.
    """

    def __init__(self, first: "int", *, second: "int | None" = None, **others): ...


def test_a_docstring_becomes_markdown(script):
    assert script["signature"]("Example", Example) == "Example(first: int, *, second: int | None = None, **others)"
    signature, *paragraphs = script["described"]("Example", Example)
    assert signature == "```text\nExample(first: int, *, second: int | None = None, **others)\n```"
    assert paragraphs == [
        "One sentence about [`S2T`](#s2t) and `torch.Tensor`.",
        "**Args**\n\n- `first`, `second` (`int`): two numbers, of which the second is larger.",
        "**Raises**\n\n- `ValueError`: otherwise.",
        "The end.",
    ]
