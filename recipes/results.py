"""Writes tables: from docs/results/*.json to Markdown beside them, and into other texts between their markers.

See `python recipes/results.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.paper.results import main


if __name__ == "__main__":
    run(main)
