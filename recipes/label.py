"""Labels problems: the student's rollouts, its candidates at decision points, the teacher's view of them.

See `python recipes/label.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.labeling.label import main


if __name__ == "__main__":
    run(main)
