"""How often a selector chooses the candidate that the teacher would, for `evaluate.load`."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Agree@1: the share of decision points at which a selector chooses the candidate that the teacher ranks first. At a
decision point a small model offers its most likely next tokens, a selector takes one of them, and the teacher's
probabilities say which one it should have been. No text is generated.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): which candidate the selector chooses at each point. A number from 0 in the order of
        the candidates, or a token id.
    references (`list` of `int`): the teacher's best candidate at each point, counted in the same way.

Returns:
    agree_at_1 (`float`): share of points at which both are the same, in [0, 1].
    agrees (`list` of `bool`): whether they are, at each point.

Raises:
    ValueError: for no point, inputs of different lengths, or what is no integer of at least 0.

Examples:
    >>> import evaluate
    >>> from s2t_recipes.metrics import FOLDER
    >>> agreement = evaluate.load(str(FOLDER / "selection_agreement"))
    >>> agreement.compute(predictions=[0, 2, 1, 0], references=[0, 1, 1, 0])
    {'agree_at_1': 0.75, 'agrees': [True, False, True, True]}
"""

_CITATION = """
@misc{selecttothink,
    title = {Select to Think},
    eprint = {2604.26940},
    archivePrefix = {arXiv},
    url = {https://arxiv.org/abs/2604.26940},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SelectionAgreement(evaluate.Metric):
    def _info(self):
        number = datasets.Value("float64")  # as int64 a score of 0.7 would be read as candidate 0 without a word
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://arxiv.org/abs/2604.26940"],
        )

    def _compute(self, predictions, references):
        chosen_N, best_N = np.array(predictions, dtype=float), np.array(references, dtype=float)
        for name, values_N in (("predictions", chosen_N), ("references", best_N)):
            bad_N = values_N[~((values_N >= 0) & (values_N % 1 == 0))]
            if not len(values_N) or len(bad_N):
                got = bad_N[0] if len(bad_N) else "none"
                raise ValueError(f"`{name}` must be integers of at least 0, one a point, got {got}.")
        agrees_N = chosen_N == best_N
        return {"agree_at_1": float(agrees_N.mean()), "agrees": agrees_N.tolist()}
