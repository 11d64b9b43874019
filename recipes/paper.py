"""Regenerates the tables of docs/results: every claim of the documentation, by one command.

See `python recipes/paper.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.paper.run import main


if __name__ == "__main__":
    run(main)
