"""What training changed elsewhere: how far a model has moved from the base model on text that it was not trained for.

See `python recipes/retention.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.evaluation.retention import main


if __name__ == "__main__":
    run(main)
