"""How often a selector agrees with the teacher at labelled, held-out decision points, beside the controls.

See `python recipes/agreement.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.evaluation.agreement import main


if __name__ == "__main__":
    run(main)
