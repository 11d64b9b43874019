"""Whether generated texts end in the right answer, for `evaluate.load`."""

import datasets
import evaluate

from s2t_recipes.answers import grade


_DESCRIPTION = """
Share of generated texts whose answer is right. An answer is what follows the last `####` on its line, or what
math-verify finds, a `\\boxed{...}` or the last expression. Numbers and formulas are compared by value: 8,000 is 8000,
and with math-verify 1/2 is 0.5. A text without a readable answer is wrong.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): generated texts, not yet reduced to their answers.
    references (`list` of `str`): right answers, one a text: bare ("42"), marked ("... #### 42") or in a box.
    style (`str`): how answers are read. "hash": what follows `####`, nothing else; "math": by math-verify; "auto", the
        default: "hash" for texts with `####`, else "math".

Returns:
    accuracy (`float`): share of right answers, in [0, 1].
    correct (`list` of `bool`): whether each answer is right.
    answers (`list` of `str` or `None`): the answer of each text, one spelling a number; `None` where there is none.

Raises:
    ValueError: for no text, inputs of different lengths or other types, or an unknown style.

Examples:
    >>> import evaluate
    >>> from s2t_recipes.metrics import FOLDER
    >>> math_answer = evaluate.load(str(FOLDER / "math_answer"))
    >>> math_answer.compute(predictions=["2 * 4 = 8\\n#### 8.0", "I do not know."], references=["8", "8"])
    {'accuracy': 0.5, 'correct': [True, False], 'answers': ['8', None]}
"""

_CITATION = """
@misc{mathverify,
    title = {Math-Verify: Math Verification Library},
    author = {Kydl{\\'i}{\\v{c}}ek, Hynek},
    url = {https://github.com/huggingface/math-verify},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MathAnswer(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://github.com/huggingface/math-verify", "https://arxiv.org/abs/2604.26940"],
        )

    def _compute(self, predictions, references, style="auto"):
        for name, texts in (("predictions", predictions), ("references", references)):
            if not texts or None in texts:
                raise ValueError(f"`{name}` must be texts, at least one, got {'None' if texts else 'none'}.")
        graded = [grade(text, gold, style) for text, gold in zip(predictions, references)]
        correct = [is_right for _, is_right in graded]
        return {
            "accuracy": sum(correct) / len(correct),
            "correct": correct,
            "answers": [answer for answer, _ in graded],
        }
