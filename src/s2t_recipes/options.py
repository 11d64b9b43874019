"""Options of a command: dataclasses, read from the command line and a YAML file, and listed by `--help`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import sys
from collections.abc import Iterable

from trl import TrlParser


#: Packages whose options `--help` lists first.
OURS = ("s2t_recipes", "transformers_s2t")


class Parser(TrlParser):
    """TRL's parser, with a `--help` that lists our own options before those of the libraries.

    Args:
        dataclass_types: their fields are the options. An option is listed under the class that introduced it.
    """

    def __init__(self, *dataclass_types: type):
        usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=_HelpFormatter)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        """As TRL's.

        Raises:
            ValueError: where `--config` is the last word, too.
        """
        args = sys.argv[1:] if args is None else list(args)
        if args and args[-1] == "--config":
            raise ValueError("`--config` must be followed by a YAML file.")
        return super().parse_args_and_config(args, **kwargs)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        for title, names in self._sections().items():
            formatter.start_section(title)
            formatter.add_arguments(_spelled_once(action) for action in self._actions if action.dest in names)
            formatter.end_section()
        return formatter.format_help()

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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return f"{action.help or ''} (required)" if action.required else super()._get_help_string(action)


def _spelled_once(action: argparse.Action) -> argparse.Action:
    """The option without its second spelling, `--like-this`."""
    action = copy.copy(action)
    action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
    return action


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _title(cls: type) -> str:
    if _package(cls) in OURS:
        return re.sub(r"[\[\]`]", "", cls.__doc__.strip().split("\n")[0]).rstrip(".")
    return f"{_package(cls)}.{cls.__name__}"
