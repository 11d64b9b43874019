"""Options of a command, in two forms with one `--help`: dataclasses, also read from YAML, or added one by one."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any

from trl import TrlParser


#: Packages whose options `--help` lists first.
OURS = ("s2t_recipes", "transformers_s2t")


def check_least(args: Any, **least: float) -> None:
    """Raises a ValueError for the first argument below its least value; `None` is legal: no limit."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"`{name}` must be at least {low}, got {value!r}.")


class _OurParser:
    """What our parsers share: a `--help` of one usage line and sections of options, each with its default or
    "(required)"; and an unknown option is reported before anything else, with the nearest known one."""

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple:
        """As argparse's.

        Raises:
            ValueError: for an option that there is not.
        """
        args = sys.argv[1:] if args is None else list(args)
        options = args[: args.index("--")] if "--" in args else args
        self._check_known(option.split("=")[0] for option in options if option.startswith("--"))
        return super().parse_known_args(args, namespace)

    def _check_known(self, options: Iterable[str], where: str = "") -> None:
        known = self._option_string_actions
        for option in options:
            if option in known or " " in option:  # a text, which argparse takes for a value
                continue
            names = [name for name in known if "-" not in name[2:]]  # not the second spelling, --like-this
            near = difflib.get_close_matches(f"--{option[2:].replace('-', '_')}", names, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all."
            raise ValueError(f"There is no option {option}{where}; {hint}")

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        for title, names in self._sections().items():
            formatter.start_section(title)
            formatter.add_arguments(_spelled_once(action) for action in self._actions if action.dest in names)
            formatter.end_section()
        return formatter.format_help()


class Parser(_OurParser, TrlParser):
    """TRL's parser, with a `--help` that lists our own options before those of the libraries.

    Args:
        dataclass_types: their fields are the options. An option is listed under the class that introduced it.
    """

    def __init__(self, *dataclass_types: type):
        usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        """As TRL's.

        Raises:
            ValueError: where `--config` is the last word, too.
        """
        args = sys.argv[1:] if args is None else list(args)
        if args and args[-1] == "--config":
            raise ValueError("`--config` must be followed by a YAML file.")
        return super().parse_args_and_config(args, **kwargs)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As TRL's, but an unknown key is an error at once, not after the values were checked."""
        self._check_known((f"--{name}" for name in values), " (in the YAML file)")
        return super().set_defaults_with_config(**values)

    def _sections(self) -> dict[str, set[str]]:
        """Title -> names of options. Those that a class of ours takes from a library's class belong to the latter."""
        found: dict[type, set[str]] = {}
        for dataclass_type in self.dataclass_types:
            family = [cls for cls in dataclass_type.__mro__ if dataclasses.is_dataclass(cls)]
            for field in dataclasses.fields(dataclass_type):
                first = next(cls for cls in reversed(family) if field.name in cls.__annotations__)
                owner = next(cls for cls in family if _package(cls) == _package(first))
                found.setdefault(owner, set()).add(field.name)
        order = [cls for dataclass_type in self.dataclass_types for cls in dataclass_type.__mro__ if cls in found]
        order.sort(key=lambda cls: _package(cls) not in OURS)
        return {_title(cls): found[cls] for cls in order}


class SmallParser(_OurParser, argparse.ArgumentParser):
    """argparse's parser with the same `--help`, for few options, or one without a name.

    Args:
        title: title of the options.
        usage: what is typed behind the program's name.
    """

    def __init__(self, title: str, usage: str = "[--OPTION VALUE ...]"):
        super().__init__(usage=f"%(prog)s {usage}", formatter_class=_HelpFormatter, allow_abbrev=False)
        self.title = title

    def _sections(self) -> dict[str, set[str]]:
        return {self.title: {action.dest for action in self._actions if action.dest != "help"}}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help or ''} (required)"
        has_none = action.default is None or action.default is False or action.default == []
        if has_none or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _spelled_once(action: argparse.Action) -> argparse.Action:
    """The option without its second spelling, `--like-this`."""
    action = copy.copy(action)
    names = [option for option in action.option_strings if "_" in option or f"--{action.dest}" == option]
    action.option_strings = names or action.option_strings
    return action


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _title(cls: type) -> str:
    if _package(cls) in OURS:
        return re.sub(r"[\[\]`]", "", cls.__doc__.strip().split("\n")[0]).rstrip(".")
    return f"{_package(cls)}.{cls.__name__}"
