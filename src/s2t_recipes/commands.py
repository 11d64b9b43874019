"""How a command of this package starts and ends, and where the commands of a checkout lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


#: recipes/ of the checkout that this package is installed from. An installed wheel has none.
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class CommandFailed(RuntimeError):
    """A command could not finish, for a reason that its message tells completely."""


def run(main: Callable[[], None]) -> None:
    """Entry point of a command: errors become one line. Exit status 2: the input is wrong, 1: the work failed."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except CommandFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def recipe(name: str) -> str:
    """Path of a script of recipes/, relative to the working directory if that is shorter."""
    path = RECIPES / name
    return min(os.path.relpath(path), str(path), key=len)
