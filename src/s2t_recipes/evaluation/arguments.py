"""Options of `s2t eval`: which models, on which problems, with which settings. Checks values, reads no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from s2t_recipes.answers import STYLES
from s2t_recipes.models import DTYPES
from s2t_recipes.options import check_least
from s2t_recipes.problems import read_template_kwargs
from transformers_s2t import S2TDecodingConfig
from transformers_s2t.config import check_choice


BATCH_ORDERS = ("prompt_length", "greedy_length")


@dataclass
class EvaluateArguments:
    """What is compared, on which problems, and how.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    model: str = HfArg(help="Small model: a Hub id or a local folder.")
    dataset: str = HfArg(help="Problems to evaluate: a .jsonl or .json file, a local folder or a Hub id.")
    output_dir: str = HfArg(help="Folder for report.json and records/.")
    teacher_model: str | None = HfArg(
        default=None, help="Large model; needed by teacher, takeover, s2t and the kl trigger."
    )
    adapters: list[str] = HfArg(
        default_factory=list, help="S2T-Local adapters, one folder (or Hub id) per selector seed."
    )
    tuned: list[str] = HfArg(
        default_factory=list,
        help="Adapters that write text themselves (`s2t imitate`), as name=folder; the same name again is another "
        "seed.",
    )
    thresholds_from: str | None = HfArg(
        default=None,
        help="Adapter whose thresholds and router serve the rows without an adapter (default: the first one).",
    )
    split: str = HfArg(default="test", help="Split of the data set.")
    limit: int | None = HfArg(default=None, help="Number of problems, the first ones (default: all).")
    prompt_column: str = HfArg(default="prompt", help="Column with the prompt.")
    answer_column: str = HfArg(default="answer", help="Column with the answer.")
    answer_style: str = HfArg(
        default="auto",
        help="How answers are read: hash (after ####), math (math-verify: the boxed or last expression) or auto (hash "
        "where a text has ####, else math). An unclosed \\boxed{ is no answer.",
    )
    policies: list[str] | None = HfArg(
        default=None,
        help="Policies `name[:trigger[:rate]]`, e.g. greedy maj@8 s2t-local:margin:0.1 s2t-local:always (default: the "
        "standard table, as far as teacher, adapters, thresholds and labels are given).",
    )
    prior_labels: str | None = HfArg(
        default=None,
        help="Training labels of the adapters, for the control `prior`: the token prior counts the teacher's choices "
        "in them. They must not share a problem with the evaluated ones.",
    )
    zero_shot_text: str | None = HfArg(
        default=None,
        help="Text that the control `zero-shot` makes unlikely, e.g. '?': it takes the candidate after which the "
        "small model is least likely to write the first token of this text (default: the candidate after which the "
        "small model is the most certain of its next token).",
    )
    batch_size: int = HfArg(default=128, help="Sequences per generate call.")
    batch_by: str = HfArg(
        default="prompt_length",
        help="Which problems share a batch: 'prompt_length', those with prompts of like length; 'greedy_length', "
        "those whose greedy texts are of like length, where greedy is the first of `policies` (samples of maj@n stay "
        "with their prompt). With 'greedy_length', finished rows also leave their batch where no selector runs.",
    )
    max_new_tokens: int = HfArg(default=256, help="Largest number of new tokens, for every policy.")
    temperature: float = HfArg(default=0.7, help="Sampling temperature of maj@n; everything else is greedy.")
    num_candidates: int = HfArg(default=8, help="Number K of candidates that are offered at a step.")
    min_prob_ratio: float = HfArg(
        default=0.05, help="Candidate floor: least probability of a candidate, as a share of the best one's."
    )
    bare_margin: float = HfArg(
        default=0.0,
        help="Lead in [0, 1] by which a candidate's score must exceed the first one's to be taken, in s2t-local-bare.",
    )
    seed: int = HfArg(default=0, help="Seed of maj@n, the random control and the intervals.")
    dtype: str = HfArg(
        default="auto",
        help="Type of the weights: auto (float32 on a CPU, else the checkpoint's own), float32, bfloat16 or float16.",
    )
    chat_template: bool = HfArg(default=False, help="Put prompts into the tokenizer's chat template.")
    system_prompt: str | None = HfArg(default=None, help="System message of the chat template.")
    chat_template_kwargs: dict[str, Any] | str | None = HfArg(
        default=None,
        help="Variables of the chat template: a JSON object, e.g. '{\"enable_thinking\": false}', in YAML a mapping.",
    )
    label_dirs: list[str] = HfArg(
        default_factory=list,
        help="Folders of labels that a selector has seen. They must not share a problem with the evaluated ones.",
    )
    eval_labels: str | None = HfArg(
        default=None, help="Held-out labels, for Hit@K and for the selectors' agreement with the teacher."
    )
    allow_leaks: bool = HfArg(
        default=False, help="Evaluate problems that were seen before; the report then says so, in red."
    )
    num_examples: int = HfArg(
        default=2, help="Number of examples in the report that greedy has wrong and S2T-Local right."
    )

    def __post_init__(self):
        self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        check_least(self, batch_size=1, max_new_tokens=1, limit=1, num_examples=0)
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature!r}.")
        if not 0 <= self.bare_margin <= 1:
            raise ValueError(f"`bare_margin` must be in [0, 1], as scores are, got {self.bare_margin!r}.")
        for name, legal in {"answer_style": STYLES, "dtype": DTYPES, "batch_by": BATCH_ORDERS}.items():
            check_choice(name, getattr(self, name), legal)
        S2TDecodingConfig(num_candidates=self.num_candidates, min_prob_ratio=self.min_prob_ratio)
