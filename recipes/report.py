"""One picture of one evaluation: accuracy by policy, Hit@K, and two generations token by token.

See `python recipes/report.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.report.report import main


if __name__ == "__main__":
    run(main)
