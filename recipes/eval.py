"""Compare ways of decoding on the same problems with the same settings, and print one table with intervals.

See `python recipes/eval.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.evaluation.run import main


if __name__ == "__main__":
    run(main)
