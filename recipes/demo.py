"""The whole method in one command: data, labels, selectors, calibration, evaluation, picture.

See `python recipes/demo.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.demo import main


if __name__ == "__main__":
    run(main)
