"""Regenerate the tables of docs/results. See `python recipes/paper.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.paper.run")
