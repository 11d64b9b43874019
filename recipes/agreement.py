"""How often a selector agrees with the teacher at held-out points. See `python recipes/agreement.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.evaluation.agreement")
