"""Compare ways of decoding on the same problems with the same settings, and print one table with intervals.

    python recipes/eval.py --model M --teacher_model T --adapters RUN/adapter-seed0 RUN/adapter-seed1 \
        --dataset test.jsonl --output_dir RUN

A policy is written `name[:trigger[:rate]]`:

    greedy, maj@8, teacher       without a trigger (maj@8: eight samples vote, and what would be right by each other
                                 votes together; best@8, a row beside it, is the oracle that takes the right one where
                                 there is one)
    takeover                     the teacher's own token replaces the student's
    s2t                          the teacher selects among the student's candidates (the ceiling of its trigger)
    s2t-local, s2t-local-bare    an adapter selects; bare: by its score alone, without fusion. Once per adapter
    second, random               controls: the second candidate, any candidate above the floor
    prior                        control: the candidate that the teacher chose most often in --prior_labels, whatever
                                 the text; a tie goes to the candidate that the student ranks higher
    zero-shot                    control: the small model as it is reads the text with each candidate behind it, and
                                 takes the one after which it is the least likely to write --zero_shot_text (a "?",
                                 say), or without that argument the most certain of its next token: score -log P(first
                                 token of the text), or minus the entropy of the next token
    sft, kd ...                  without a trigger: the small model with an adapter of --tuned, decoding greedily

with the triggers always, entropy, margin, router, kl, random; all but "always" take the share of tokens that should
fire.

All policies run through `model.generate` with one clean generation config: nothing is inherited from the checkpoints
but their end-of-sequence tokens. Every finished policy is kept in OUTPUT_DIR/records; running again with the same
settings only runs what is missing. With --eval_labels the adapters are compared with the teacher at labelled points
too (fidelity.py). recipes/report.py makes a page of OUTPUT_DIR. Problems that an adapter has seen, in training or
after (its seen_problems.json), are refused, and so are those of --label_dirs and --prior_labels. This file does not
know how a selector scores or how an answer is read.

Legend: B rows, S steps, N problems, P seeds (adapters) of a policy.
"""

from __future__ import annotations

import gc
import math
import platform
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, Cache, GenerationConfig, PreTrainedModel

from s2t_recipes.adapters import check_model, check_tuned, merge_adapter
from s2t_recipes.answers import STYLES, extract_answer, is_correct, stand_ins
from s2t_recipes.estimates import NUM_RESAMPLES, bootstrap_interval
from s2t_recipes.evaluation.controls import (
    PriorSelector,
    RandomCandidateSelector,
    SecondCandidateSelector,
    ZeroShotSelector,
    token_prior,
)
from s2t_recipes.evaluation.fidelity import DEFINITION, describe, measure_fidelity, measure_hits, open_labels
from s2t_recipes.models import default_device, load_model, padding_token_id
from s2t_recipes.problems import PROMPT_SETTINGS, Problem, encode_prompts, load_problems, read_template_kwargs
from s2t_recipes.records import fingerprint, hash_of, read_records, write_records
from s2t_recipes.texts import TEXTS_NAME, collect_texts
from transformers_s2t import (
    FusionWeights,
    LocalSelector,
    S2TDecodingConfig,
    S2TTrace,
    Selector,
    SelectorConfig,
    TeacherSelector,
    __version__,
    s2t_generate,
)
from transformers_s2t.config import THRESHOLD_TRIGGERS
from transformers_s2t.files import write_json
from transformers_s2t.labeling.rollout import generate_rows
from transformers_s2t.labels.folder import read_header, read_labels
from transformers_s2t.labels.seen_problems import STAGES, check_unseen
from transformers_s2t.models.shared_prefix import pad_prompts, read_prompts, read_shared
from transformers_s2t.reserved_tokens import check_same_vocabulary, vocab_hash
from transformers_s2t.router import Router


LOCAL_POLICIES = ("s2t-local", "s2t-local-bare")
TEACHER_POLICIES = ("teacher", "takeover", "s2t")
SELECTING_POLICIES = ("takeover", "s2t", *LOCAL_POLICIES, "second", "random", "prior", "zero-shot")
TRIGGER_CHOICES = ("always", *THRESHOLD_TRIGGERS)
DEFAULT_POLICIES = (
    ("greedy", "maj@8", "teacher")
    + ("takeover:kl:0.05", "s2t:kl:0.05", "s2t-local:kl:0.05", "takeover:kl:0.1", "s2t:kl:0.1", "s2t-local:kl:0.1")
    + ("second:kl:0.1", "random:kl:0.1")
    + ("s2t:entropy:0.05", "s2t-local:entropy:0.05", "s2t:margin:0.05", "s2t-local:margin:0.05")
    + ("s2t:router:0.05", "s2t-local:router:0.05", "s2t:router:0.1", "s2t-local:router:0.1")
    + ("s2t:always", "s2t-local:always", "second:always", "prior:always", "zero-shot:always")
)
RECORDS_FORMAT = 3  # of records/, and of how answers are read: those of another format are run again
KINDS = ".tkf"  # plain, triggered with one candidate only, asked and kept, flipped
DEFINITIONS = {
    "accuracy": "per cent of problems, mean over the seeds",
    "accuracy_ci": f"95 % percentile bootstrap over problems, {NUM_RESAMPLES} resamples, of the mean over seeds",
    "accuracy_sd": "standard deviation over the seeds, where there are several",
    "gain, gain_ci": "accuracy minus greedy's, and the same bootstrap over problems of that difference (paired)",
    "helped, hurt": "problems that greedy has wrong and the policy right, and the reverse; mean over seeds",
    "achieved_rate": "triggered steps / generated tokens (end-of-sequence included)",
    "asked_rate": "steps with a trigger and two or more candidates above the floor / generated tokens",
    "flip_rate": "steps where another token than the student's first was taken / generated tokens",
    "mcnemar_p": "exact two-sided McNemar test against greedy; with several seeds the largest of their p-values",
    "seconds_vs_greedy": "time in generate relative to greedy in the same run, at this batch size (with "
    "batch_by='greedy_length' rows that have ended leave greedy's batches and not a selector's)",
    "cpu_seconds_vs_greedy": "the same of the process's CPU time, all threads",
    "extra_forwards": "batch forwards beyond those of plain decoding, by kind, mean over seeds",
    "fidelity": DEFINITION,
    "student_tokens, teacher_tokens": "tokens that a problem asks of each model, prompts, padding-free decoding, "
    "candidates and all samples counted, each as if it were read alone; mean over seeds",
}


@dataclass
class EvaluateArguments:
    """Arguments of recipes/eval.py.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    model: str = field(metadata={"help": "The small model: a Hub id or a local folder."})
    dataset: str = field(metadata={"help": "Problems to evaluate: a .jsonl/.json file, a local folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Where report.json and records/ go."})
    teacher_model: str | None = field(
        default=None, metadata={"help": "The large model; needed by teacher, takeover, s2t and the kl trigger."}
    )
    adapters: list[str] = field(
        default_factory=list, metadata={"help": "S2T-Local adapters, one folder (or Hub id) per selector seed."}
    )
    tuned: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Adapters that decode by themselves (recipes/train_baseline.py), as name=folder; the same name "
            "again is another seed."
        },
    )
    thresholds_from: str | None = field(
        default=None,
        metadata={
            "help": "Adapter whose thresholds and router serve the rows without an adapter (default: the first one)."
        },
    )
    split: str = field(default="test", metadata={"help": "Split of the data set."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answer."})
    answer_style: str = field(
        default="auto",
        metadata={
            "help": "How answers are read: hash (after ####), math (math-verify: the boxed or last expression) or "
            "auto (hash where a text has ####, else math). An unclosed \\boxed{ is no answer. See answers.py."
        },
    )
    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "Policies `name[:trigger[:rate]]`, e.g. greedy maj@8 s2t-local:margin:0.1 s2t-local:always. "
            "Default: the standard table, as far as teacher, adapters, thresholds and labels are given."
        },
    )
    prior_labels: str | None = field(
        default=None,
        metadata={
            "help": "Training labels of the adapters, for the control `prior`: the token prior counts the teacher's "
            "choices in them. Sharing a problem with the evaluated ones is an error."
        },
    )
    zero_shot_text: str | None = field(
        default=None,
        metadata={
            "help": "Of the control `zero-shot`: it takes the candidate after which the small model is least likely "
            "to write the first token of this text, e.g. '?' (default: the candidate after which it is the most "
            "certain of its next token)."
        },
    )
    batch_size: int = field(default=128, metadata={"help": "Sequences per generate call."})
    batch_by: str = field(
        default="prompt_length",
        metadata={
            "help": "Which problems share a batch: those of like 'prompt_length', or 'greedy_length': whose greedy "
            "texts are about as long, where greedy is the first of `policies` (the samples of maj@n stay with their "
            "prompts). With it rows that have ended leave their batch too, where no selector runs."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "New tokens at most, for every policy."})
    temperature: float = field(default=0.7, metadata={"help": "Of maj@n; everything else is greedy."})
    num_candidates: int = field(default=8, metadata={"help": "K, the candidates offered at a step."})
    min_prob_ratio: float = field(
        default=0.05, metadata={"help": "Candidates below this share of the best one's probability are not offered."}
    )
    bare_margin: float = field(
        default=0.0,
        metadata={"help": "s2t-local-bare keeps the first candidate unless another's score is higher by this."},
    )
    seed: int = field(default=0, metadata={"help": "Of maj@n, the random control and the intervals."})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16 or float16."},
    )
    chat_template: bool = field(default=False, metadata={"help": "Format prompts with the tokenizer's template."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message, with --chat_template."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables of the chat template: a JSON object, e.g. '{\"enable_thinking\": false}', in YAML a "
            "mapping."
        },
    )
    label_dirs: list[str] = field(
        default_factory=list,
        metadata={"help": "Label folders the selector saw; sharing a problem with the evaluated ones is an error."},
    )
    eval_labels: str | None = field(
        default=None,
        metadata={"help": "Held-out label folder for Hit@K, and for the selectors' agreement with the teacher."},
    )
    allow_leaks: bool = field(
        default=False,
        metadata={"help": "Evaluate problems that were seen before; the report then says so, in red."},
    )
    num_examples: int = field(
        default=2, metadata={"help": "Examples in the report that greedy has wrong and S2T-Local right."}
    )

    def __post_init__(self):
        self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit!r}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature!r}.")
        if not 0 <= self.bare_margin <= 1:
            raise ValueError(f"`bare_margin` must be in [0, 1], as scores are, got {self.bare_margin!r}.")
        if self.num_examples < 0:
            raise ValueError(f"`num_examples` must be at least 0, got {self.num_examples!r}.")
        choices = {"answer_style": STYLES, "dtype": ("auto", "float32", "bfloat16", "float16")}
        choices["batch_by"] = ("prompt_length", "greedy_length")
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, legal))}, got {getattr(self, name)!r}."
                )
        S2TDecodingConfig(num_candidates=self.num_candidates, min_prob_ratio=self.min_prob_ratio)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


@dataclass(frozen=True)
class Policy:
    """One row of the table. `num_votes` is the n of maj@n, 0 elsewhere."""

    name: str
    trigger: str | None = None
    target_rate: float | None = None
    num_votes: int = 0
    is_tuned: bool = False

    @classmethod
    def parse(cls, text: str, tuned: Collection[str] = ()) -> Policy:
        """Reads `name[:trigger[:rate]]`; `tuned` are the names of adapters that decode by themselves.

        Raises:
            ValueError: saying which part is wrong and what is legal.
        """
        name, *rest = text.split(":")
        problem = f"Policy {text!r}: "
        if name in ("greedy", "teacher") or name.startswith("maj@") or name in tuned:
            if rest:
                raise ValueError(f"{problem}{name!r} takes no trigger.")
            if name in tuned:
                return cls(name, is_tuned=True)
            if not name.startswith("maj@"):
                return cls(name)
            if not name[4:].isdigit() or not 2 <= int(name[4:]) <= 256:
                raise ValueError(f"{problem}n of maj@n must be an integer in [2, 256], got {name[4:]!r}.")
            return cls(f"maj@{int(name[4:])}", num_votes=int(name[4:]))
        if name not in SELECTING_POLICIES:
            legal = ", ".join(("greedy", "maj@N", "teacher", *SELECTING_POLICIES, *tuned))
            raise ValueError(f"{problem}the name must be one of {legal}, got {name!r}.")
        if not rest or rest[0] not in TRIGGER_CHOICES:
            got = f"got {rest[0]!r}" if rest else "got none"
            raise ValueError(f"{problem}the trigger must be one of {', '.join(TRIGGER_CHOICES)}, {got}.")
        trigger = rest[0]
        if trigger == "always":
            if len(rest) > 1:
                raise ValueError(f"{problem}the trigger 'always' takes no rate.")
            return cls(name, trigger)
        try:
            (rate,) = map(float, rest[1:])
        except ValueError:
            rate = math.nan
        if not 0 < rate <= 1:
            raise ValueError(
                f"{problem}the trigger {trigger!r} needs a rate in (0, 1], e.g. {name}:{trigger}:0.1, "
                f"got {':'.join(rest[1:]) or 'none'}."
            )
        return cls(name, trigger, rate)

    @property
    def label(self) -> str:
        rate = [] if self.target_rate is None else [f"{self.target_rate:g}"]
        return ":".join([self.name, *([self.trigger] if self.trigger else []), *rate])

    @property
    def is_local(self) -> bool:
        return self.name in LOCAL_POLICIES

    @property
    def needs_teacher(self) -> bool:
        return self.name in TEACHER_POLICIES or self.trigger == "kl"

    @property
    def needs_thresholds(self) -> bool:
        return self.trigger in THRESHOLD_TRIGGERS and self.trigger != "random"

    def fusion(self, args: EvaluateArguments) -> FusionWeights | None:
        """The adapter's own for s2t-local (`None`), the selector's score alone everywhere else."""
        if self.name == "s2t-local":
            return None
        return FusionWeights(switch=-args.bare_margin if self.name == "s2t-local-bare" else 0.0)

    def decoding_config(self, args: EvaluateArguments) -> S2TDecodingConfig:
        return S2TDecodingConfig(
            trigger=self.trigger,
            target_rate=self.target_rate,
            num_candidates=args.num_candidates,
            min_prob_ratio=args.min_prob_ratio,
            fusion=self.fusion(args),
            seed=args.seed,
        )


def parse_tuned(texts: list[str]) -> dict[str, list[str]]:
    """Name -> folders, one per seed, of `name=folder`.

    Raises:
        ValueError: for another form, or a name that another policy has.
    """
    tuned: dict[str, list[str]] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        taken = name in ("greedy", "teacher", *SELECTING_POLICIES) or name.startswith("maj@")
        if not folder or not re.fullmatch(r"[\w.+-]+", name) or taken:
            raise ValueError(f"`tuned` must be name=folder with a name that no other policy has, got {text!r}.")
        tuned.setdefault(name, []).append(folder)
    return tuned


def choose_policies(args: EvaluateArguments, has_thresholds: bool, has_router: bool = False) -> list[Policy]:
    """The policies asked for, or the default ones that the arguments allow.

    Raises:
        ValueError: for a policy asked for without the teacher, adapters, labels, thresholds or router that it needs,
            or asked twice.
    """

    def missing(policy: Policy) -> str | None:
        if policy.needs_teacher and args.teacher_model is None:
            return "`teacher_model`"
        if policy.is_local and not args.adapters:
            return "`adapters`"
        if policy.name == "prior" and args.prior_labels is None:
            return "`prior_labels`"
        if policy.needs_thresholds and not policy.is_local and not has_thresholds:
            return "`thresholds_from` (or `adapters`)"
        if policy.trigger == "router" and not has_router:
            return "a router in every adapter (recipes/train_router.py)"
        return None

    tuned = parse_tuned(args.tuned)
    if args.policies is None:
        policies = [*map(Policy.parse, DEFAULT_POLICIES), *(Policy.parse(name, tuned) for name in tuned)]
        return [policy for policy in policies if missing(policy) is None]
    policies = [Policy.parse(text, tuned) for text in args.policies]
    if not policies:
        raise ValueError("`policies` must name at least one policy, got none.")
    for policy in policies:
        if (what := missing(policy)) is not None:
            raise ValueError(f"Policy {policy.label!r} needs {what}, got none.")
    twice = [policy.label for policy, count in Counter(policies).items() if count > 1]
    if twice:
        raise ValueError(f"`policies` must not name a policy twice, got {', '.join(twice)} more than once.")
    return policies


def majority_vote(answers: Sequence[Hashable | None]) -> int | None:
    """Index of the first sample with the winning answer; answers that are to vote together must be equal.

    What could not be read does not vote; a tie goes to the answer seen first; `None` where nothing could be read.
    """
    counts = Counter(answer for answer in answers if answer is not None)  # most_common keeps the order of first sight
    return answers.index(counts.most_common(1)[0][0]) if counts else None


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def mcnemar(helped: int, hurt: int) -> float:
    """Exact two-sided p-value that `helped` and `hurt` are equally likely."""
    total = helped + hurt
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(total + 1)]
    tail = sum(math.exp(log - total * math.log(2)) for log in logs[: min(helped, hurt) + 1])
    return min(1.0, 2 * tail)


def summarize(correct_PN: np.ndarray, greedy_N: np.ndarray | None, seed: int = 0) -> dict:
    """Accuracy, interval and the paired comparison with greedy of one row of the table; accuracies in per cent."""
    correct_PN = np.asarray(correct_PN, dtype=bool)
    summary = {
        "accuracy": 100 * float(correct_PN.mean()),
        "accuracy_ci": [100 * edge for edge in bootstrap_interval(correct_PN.mean(0), seed)],
        "accuracy_by_seed": [100 * float(value) for value in correct_PN.mean(1)],
        "accuracy_sd": 100 * float(correct_PN.mean(1).std(ddof=1)) if len(correct_PN) > 1 else None,
        "gain": None,
        "gain_ci": None,
        "helped": None,
        "hurt": None,
        "mcnemar_p": None,
    }
    if greedy_N is not None:
        greedy_N = np.asarray(greedy_N, dtype=bool)
        gain_N = correct_PN.mean(0) - greedy_N
        summary["gain"] = 100 * float(gain_N.mean())
        summary["gain_ci"] = [100 * edge for edge in bootstrap_interval(gain_N, seed)]
        helped_P, hurt_P = (correct_PN & ~greedy_N).sum(1), (~correct_PN & greedy_N).sum(1)
        summary["helped"], summary["hurt"] = (
            int(counts_P[0]) if len(counts_P) == 1 else round(float(counts_P.mean()), 1)
            for counts_P in (helped_P, hurt_P)
        )
        summary["mcnemar_p"] = max(mcnemar(int(helped), int(hurt)) for helped, hurt in zip(helped_P, hurt_P))
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class Bench:
    """The problems, encoded, and the one way in which every policy is run on them."""

    def __init__(self, args: EvaluateArguments, problems: list[Problem], tokenizer, device: torch.device):
        self.args, self.problems, self.tokenizer, self.device = args, problems, tokenizer, device
        prompts = [problem.prompt for problem in problems]
        self.prompt_ids = encode_prompts(tokenizer, prompts, **{name: getattr(args, name) for name in PROMPT_SETTINGS})
        self.pad_token_id = padding_token_id(tokenizer, args.model)
        # long prompts first: a batch that does not fit into memory fails at once
        self.order = sorted(range(len(problems)), key=lambda i: -len(self.prompt_ids[i]))
        self.order_of_lengths = self.order

    def expect_lengths(self, greedy: list[dict]) -> None:
        """Puts problems together whose greedy texts are about as long: other policies write about as much."""
        self.order_of_lengths = sorted(self.order, key=lambda i: -greedy[i]["num_tokens"])

    def check_length(self, max_positions: int | None) -> None:
        """Refuses prompts that leave no room for `max_new_tokens`."""
        longest = max(map(len, self.prompt_ids))
        if max_positions is not None and longest + self.args.max_new_tokens > max_positions:
            raise ValueError(
                f"`max_new_tokens` must be at most {max(max_positions - longest, 0)} (context of {max_positions} "
                f"tokens, longest prompt {longest}), got {self.args.max_new_tokens}."
            )

    def run(
        self,
        policy: Policy,
        model: PreTrainedModel,
        selector: Selector | None = None,
        teacher: PreTrainedModel | None = None,
        progress=None,
    ) -> tuple[dict, list[dict]]:
        """Runs one policy on all problems; returns totals and one record per problem, in the problems' order."""
        args = self.args
        kwargs = {"max_new_tokens": args.max_new_tokens, "pad_token_id": self.pad_token_id, "do_sample": False}
        eos = model.generation_config.eos_token_id
        kwargs["eos_token_id"] = self.tokenizer.eos_token_id if eos is None else eos
        trace = None
        if policy.num_votes:
            kwargs |= {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        elif policy.trigger is not None:
            trace = S2TTrace()
            kwargs |= {
                "custom_generate": s2t_generate,
                "selector": selector,
                "decoding_config": policy.decoding_config(args),
                "trace": trace,
            }
            if policy.trigger == "kl":
                kwargs["teacher_model"] = teacher
        totals = {
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "student_tokens": 0,
            "teacher_tokens": 0,
            "steps": 0,
            "generated": 0,
            "triggered": 0,
            "asked": 0,
            "flipped": 0,
            "forwards": {},
        }
        records: list[dict | None] = [None] * len(self.problems)
        per_batch = max(1, args.batch_size // max(1, policy.num_votes))
        order = self.order if policy.num_votes else self.order_of_lengths
        for number, start in enumerate(range(0, len(order), per_batch)):
            rows = order[start : start + per_batch]
            inputs = pad_prompts([self.prompt_ids[i] for i in rows], self.pad_token_id, filter(None, [model, teacher]))
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            torch.manual_seed(args.seed * 1_000_003 + number)
            began, cpu_began = self._clock(), time.process_time()
            cache = None
            if policy.num_votes:
                cache = read_prompts(model, **inputs, num_copies=policy.num_votes)
                inputs = {name: rows_BT.repeat_interleave(policy.num_votes, 0) for name, rows_BT in inputs.items()}
            if policy.trigger is None and args.batch_by == "greedy_length":
                new_ids_BS = self._write_rows(model, inputs, kwargs, cache)
            else:
                if policy.trigger is None:  # s2t_generate reads what prompts share once by itself
                    cache = read_shared(model, **inputs) if cache is None else cache
                output_BT = model.generate(**inputs, **kwargs, past_key_values=cache)
                new_ids_BS = output_BT[:, inputs["input_ids"].shape[1] :]
                del cache, output_BT
            totals["seconds"] += self._clock() - began
            totals["cpu_seconds"] += time.process_time() - cpu_began
            new_ids_BS = new_ids_BS.cpu()
            num_tokens_B = count_tokens(new_ids_BS, kwargs["eos_token_id"])
            totals["steps"] += new_ids_BS.shape[1]
            totals["generated"] += int(num_tokens_B.sum())
            read = int(inputs["attention_mask"].sum()) + int(num_tokens_B.sum())
            totals["teacher_tokens" if policy.name == "teacher" else "student_tokens"] += read
            if trace is not None:
                teacher_tokens = trace.tokens.get("teacher", 0)
                totals["teacher_tokens"] += teacher_tokens
                totals["student_tokens"] += sum(trace.tokens.values()) - teacher_tokens
            batch_records = self._grade(policy, rows, new_ids_BS, num_tokens_B)
            if trace is not None:
                self._read_trace(trace, new_ids_BS, num_tokens_B, totals, batch_records)
            for i, record in zip(rows, batch_records):
                records[i] = record
            if progress is not None:
                progress.update(len(rows))
        return totals, records

    def _write_rows(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], kwargs: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor:
        """New tokens (B, S) of plain decoding in which rows that have ended leave the batch."""
        settings = {name: value for name, value in kwargs.items() if name != "max_new_tokens"}
        rows = generate_rows(model, inputs, GenerationConfig(**settings), kwargs["max_new_tokens"], cache=cache)
        width = max(map(len, rows))
        return torch.tensor([ids + [self.pad_token_id] * (width - len(ids)) for ids in rows])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _grade(self, policy, rows: list[int], new_ids_BS: torch.Tensor, num_tokens_B: torch.Tensor) -> list[dict]:
        texts = self.tokenizer.batch_decode(new_ids_BS, skip_special_tokens=True)
        style = self.args.answer_style
        answers = [extract_answer(text, style) for text in texts]
        records = []
        for place, i in enumerate(rows):
            problem, record = self.problems[i], {"id": self.problems[i].id}
            if policy.num_votes:
                mine = slice(place * policy.num_votes, (place + 1) * policy.num_votes)
                stands = stand_ins(texts[mine], style)
                winner = majority_vote(stands)
                record["votes"] = [None if index is None else answers[mine][index] for index in stands]
                record["any_correct"] = any(
                    answer is not None and is_correct(text, problem.answer, style)
                    for text, answer in zip(texts[mine], answers[mine])
                )
                chosen = None if winner is None else mine.start + stands[winner]
            else:
                chosen = place
                record["num_tokens"] = int(num_tokens_B[place])
                record["text"] = texts[place]
            record["answer"] = None if chosen is None else answers[chosen]
            record["correct"] = record["answer"] is not None and is_correct(texts[chosen], problem.answer, style)
            records.append(record)
        return records

    def _read_trace(
        self, trace: S2TTrace, new_ids_BS: torch.Tensor, num_tokens_B: torch.Tensor, totals: dict, records: list[dict]
    ) -> None:
        """Adds the trace of one call to the totals, and to each record its tokens and what happened at each."""
        triggered_BS, asked_BS, first_BS = (
            torch.stack([step[name] for step in trace.steps], dim=1) for name in ("triggered_B", "asked_B", "first_B")
        )
        flipped_BS = asked_BS & (first_BS != new_ids_BS)
        for name, flags_BS in (("triggered", triggered_BS), ("asked", asked_BS), ("flipped", flipped_BS)):
            totals[name] += int(flags_BS.sum())
        for kind, count in trace.forwards.items():
            totals["forwards"][kind] = totals["forwards"].get(kind, 0) + count
        codes = (triggered_BS.to(torch.uint8) + asked_BS + flipped_BS).tolist()
        ids, firsts, lengths = new_ids_BS.tolist(), first_BS.tolist(), num_tokens_B.tolist()
        for row, record in enumerate(records):
            end = lengths[row]
            record["tokens"] = ids[row][:end]
            record["kinds"] = "".join(KINDS[code] for code in codes[row][:end])
            record["student_tokens"] = {step: firsts[row][step] for step in range(end) if codes[row][step] == 3}
            record["asked"] = {}
        for number, step in enumerate(trace.steps):
            for row, asked in asked_points(step).items():
                records[row]["asked"][number] = asked


def asked_points(step: dict) -> dict[int, list]:
    """Row -> `[trigger value, [[id, selector's score, student's log-probability], ...]]` where a step was asked.

    Candidates above the floor alone, best first by the student; none for a takeover. Where fusion decided, its score
    is the fourth number. Four decimals; what is not finite is `None`.
    """
    values = step["value_B"].tolist()
    points = {row: [_short(values[row]), []] for row in step["asked_B"].nonzero()[:, 0].tolist()}
    if "rows_A" not in step:
        return points
    columns = [step[name] for name in ("candidate_ids_AK", "scores_AK", "logprobs_AK", "fused_AK")]
    mask_AK = step["mask_AK"]
    if torch.equal(columns[1][mask_AK].float(), columns[3][mask_AK]):
        del columns[3]
    for row, mask_K, *columns_K in zip(*(tensor.tolist() for tensor in (step["rows_A"], mask_AK, *columns))):
        candidates = [candidate for candidate, offered in zip(zip(*columns_K), mask_K) if offered]
        points[row][1] = [[id, *map(_short, numbers)] for id, *numbers in candidates]
    return points


def _short(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None


def count_tokens(new_ids_BS: torch.Tensor, eos_token_id: int | list[int]) -> torch.Tensor:
    """Generated tokens of each row (B,), up to and including its first end-of-sequence token."""
    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
    before_end_BS = (~torch.isin(new_ids_BS, eos)).long().cumprod(-1)
    return (before_end_BS.sum(-1) + 1).clamp_max(new_ids_BS.shape[1])


def make_selector(
    policy: Policy,
    args: EvaluateArguments,
    thresholds: dict,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prior: Counter | None,
    zero_shot_id: int | None,
) -> Selector | None:
    """The selector of a policy that needs no adapter."""
    if policy.name in ("takeover", "s2t"):
        return TeacherSelector(teacher, thresholds, takeover=policy.name == "takeover")
    if policy.name == "second":
        return SecondCandidateSelector(thresholds)
    if policy.name == "random":
        return RandomCandidateSelector(args.seed, thresholds)
    if policy.name == "prior":
        return PriorSelector(prior, thresholds)
    if policy.name == "zero-shot":
        return ZeroShotSelector(model, zero_shot_id, thresholds)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Records: finished policies on disk


def record_file(args: EvaluateArguments, policy: Policy, seed: int | None) -> Path:
    name = policy.label.replace(":", "_") + ("" if seed is None else f"_adapter{seed}")
    return Path(args.output_dir) / "records" / f"{name}.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# Labels and adapters: the leak guard, the token prior, figures of the training


def check_no_leak(problems: list[Problem], label_dirs: list[str], argument: str = "label_dirs") -> None:
    """Raises a ValueError where a problem under evaluation was labelled for training or calibration."""
    ids = {str(problem.id) for problem in problems}
    for folder in label_dirs:
        shared = sorted(ids & set(read_labels(folder, split="all")[0]["problem_id"]))
        if shared:
            raise ValueError(
                f"`{argument}`: {folder!r} holds {len(shared)} of the {len(ids)} problems to evaluate (ids "
                f"{', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}). A selector must not have seen them: "
                "evaluate on another split, or label one."
            )


def check_same_prompts(args: EvaluateArguments) -> None:
    """Raises a ValueError where labels of a selector say that prompts were put in another way than here."""
    folders = [("label_dirs", folder) for folder in args.label_dirs]
    folders += [("prior_labels", args.prior_labels), ("eval_labels", args.eval_labels)]
    for argument, folder in folders:
        if folder is None:
            continue
        header = read_header(folder) if Path(folder).is_dir() else read_labels(folder, split="all")[1]
        if header is None or "chat_template" not in header.prompt_source:
            continue
        for name in PROMPT_SETTINGS:
            there, here = header.prompt_source.get(name), getattr(args, name)
            if there != here:
                raise ValueError(
                    f"`{name}` must be as in the labels of `{argument}` {folder!r}, which were made with {there!r}, "
                    f"got {here!r}: the model would be asked in another way than the selector has learned."
                )


def read_prior(folder: str, tokenizer) -> Counter:
    """The token prior of a label folder.

    Raises:
        ValueError: where its ids are of another tokenizer.
    """
    labels, header = read_labels(folder)
    if header is not None and header.vocab_hash != vocab_hash(tokenizer):
        raise ValueError(
            f"`prior_labels`: {folder!r} was made with another tokenizer ({header.vocab_hash}) than that of `model` "
            f"({vocab_hash(tokenizer)}): its token ids mean something else."
        )
    return token_prior(labels)


def first_token(text: str, tokenizer) -> int:
    """The first token of `zero_shot_text`.

    Raises:
        ValueError: where there is none that the tokenizer knows.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"`zero_shot_text` must begin with a token that the model knows, got {text!r}.")
    return ids[0]


def local_agreement(configs: list[SelectorConfig]) -> dict[str, float]:
    """Held-out metrics that the trainer stored with the adapters, mean over them."""
    names = set.intersection(*(set(config.metrics) for config in configs)) if configs else set()
    numbers = (int, float)
    return {
        name: float(np.mean([config.metrics[name] for config in configs]))
        for name in sorted(names)
        if all(isinstance(config.metrics[name], numbers) for config in configs)
    }


# ---------------------------------------------------------------------------------------------------------------------
# The report


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def make_example(tokenizer, problem: Problem, greedy: dict, record: dict, policy: Policy) -> dict:
    """One generation, token by token: its kind, and at a flip what the student would have written."""
    tokens = []
    texts = token_texts(tokenizer, record["tokens"])
    for step, (text, kind) in enumerate(zip(texts, record["kinds"])):
        token = {"text": text, "kind": {"k": "kept", "f": "flipped"}.get(kind, "plain")}
        if record["tokens"][step] in tokenizer.all_special_ids:
            token["text"] = ""  # the end
        if kind == "f":
            first = record["student_tokens"][str(step)]
            texts_so_far = token_texts(tokenizer, record["tokens"][:step] + [first])
            token["student"] = "" if first in tokenizer.all_special_ids else texts_so_far[-1]
        tokens.append(token)
    return {
        "id": problem.id,
        "policy": policy.label,
        "prompt": problem.prompt,
        "gold": extract_answer(problem.answer, "hash") or problem.answer,
        "greedy_text": greedy["text"],
        "tokens": tokens,
    }


def pick_examples(tokenizer, problems: list[Problem], results: dict, num_examples: int) -> list[dict]:
    """Problems that greedy has wrong and S2T-Local right, of the first LLM-free local policy if there is one."""
    greedy = results.get(Policy("greedy"))
    local = sorted((policy for policy in results if policy.is_local), key=lambda policy: policy.needs_teacher)
    always = [policy for policy in local if policy.trigger == "always" and policy.name == "s2t-local"]
    if greedy is None or not local:
        return []
    policy = (always or local)[0]
    pairs = zip(problems, greedy[0][1], results[policy][0][1])
    found = [(p, before, after) for p, before, after in pairs if after["correct"] and not before["correct"]]
    found.sort(key=lambda item: "f" not in item[2]["kinds"])  # stable: the data set's order otherwise
    return [make_example(tokenizer, *item, policy) for item in found[:num_examples]]


def make_row(policy: Policy, runs: list[tuple[dict, list[dict]]], greedy, args, configs: list[SelectorConfig]) -> dict:
    """One row of the table from the runs of its seeds."""
    headers = [header for header, _ in runs]
    seeds = range(len(runs)) if policy.is_local or policy.is_tuned else (None,)
    correct_PN = np.array([[record["correct"] for record in records] for _, records in runs])
    greedy_N = None if greedy is None else np.array([record["correct"] for record in greedy[1]])
    generated = sum(header["totals"]["generated"] for header in headers)

    def share(name: str) -> float | None:
        if policy.trigger is None:
            return None
        return sum(header["totals"][name] for header in headers) / generated

    def mean_of(name: str) -> float:
        return float(np.mean([header["totals"][name] for header in headers]))

    seconds, cpu_seconds = mean_of("seconds"), mean_of("cpu_seconds")
    same_run = greedy is not None and all(header["run_id"] == greedy[0]["run_id"] for header in headers)
    kinds = sorted({kind for header in headers for kind in header["totals"]["forwards"]})
    no_answer = np.mean([[record["answer"] is None for record in records] for _, records in runs])
    return {
        "policy": policy.name,
        "label": policy.label,
        "records": [record_file(args, policy, seed).name for seed in seeds],
        "trigger": policy.trigger,
        "target_rate": policy.target_rate,
        "achieved_rate": share("triggered"),
        "asked_rate": share("asked"),
        "flip_rate": share("flipped"),
        "uses_teacher": policy.needs_teacher,
        "is_tuned": policy.is_tuned,
        "num_seeds": len(runs),
        **summarize(correct_PN, None if policy.name == "greedy" else greedy_N, args.seed),
        "no_answer": 100 * float(no_answer),
        "tokens_per_problem": generated / correct_PN.size / max(1, policy.num_votes),
        "seconds": seconds,
        "seconds_vs_greedy": seconds / greedy[0]["totals"]["seconds"] if same_run else None,
        "cpu_seconds_vs_greedy": cpu_seconds / greedy[0]["totals"]["cpu_seconds"] if same_run else None,
        "student_tokens": mean_of("student_tokens") / correct_PN.shape[1],
        "teacher_tokens": mean_of("teacher_tokens") / correct_PN.shape[1],
        "extra_forwards": {
            kind: float(np.mean([header["totals"]["forwards"].get(kind, 0) for header in headers])) for kind in kinds
        },
        "decoding_steps": float(np.mean([header["totals"]["steps"] for header in headers])),
        "adapter_scope": "/".join(sorted({config.adapter_scope for config in configs})) if policy.is_local else None,
    }


def make_rows(policy: Policy, runs: list[tuple[dict, list[dict]]], greedy, args, configs: list[SelectorConfig]):
    """The row of a policy, and after a vote the oracle on the same samples: is any of them right?"""
    yield make_row(policy, runs, greedy, args, configs)
    if policy.num_votes:
        found = [
            (header, [record | {"correct": record["any_correct"]} for record in records]) for header, records in runs
        ]
        best = replace(policy, name=f"best@{policy.num_votes}")
        yield make_row(best, found, greedy, args, configs) | {"is_oracle": True, "records": []}  # the vote has them


def align(lines: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Lines of cells as plain text with a rule below the first; the first `left` columns are set to the left."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = [
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths)) for line in lines)
    ]
    text.insert(1, "-" * len(text[0]))
    return text


def format_table(report: dict) -> str:
    """The rows of a report as aligned plain text."""

    def number(value, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    titles = ("policy", "trigger", "rate", "fired", "flips", "LLM", "accuracy", "95% interval")
    titles += ("helped", "hurt", "p", "time")
    lines = [titles]
    for row in report["rows"]:
        seeds = f" (x{row['num_seeds']})" if row["num_seeds"] > 1 else ""
        low, high = row["accuracy_ci"]
        p = row["mcnemar_p"]
        lines.append(
            (
                row["policy"] + (" (oracle)" if row.get("is_oracle") else "") + seeds,
                row["trigger"] or "-",
                number(row["target_rate"], ".3g", 100),
                number(row["achieved_rate"], ".1f", 100),
                number(row["flip_rate"], ".1f", 100),
                "yes" if row["uses_teacher"] else "-",
                number(row["accuracy"], ".1f"),
                f"[{low:.1f}, {high:.1f}]",
                number(row["helped"], "g"),
                number(row["hurt"], "g"),
                "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}",
                number(row["seconds_vs_greedy"], ".1f") + ("x" if row["seconds_vs_greedy"] is not None else ""),
            )
        )
    text = align(lines, left=2)
    meta = report["meta"]
    notes = [
        f"{meta['num_problems']} problems of {meta['dataset']}; model {meta['model']}, "
        f"teacher {meta['teacher_model']}.",
        "rate, fired, flips: per cent of generated tokens. LLM: the teacher runs at inference. (xN): mean of N seeds.",
    ]
    for leak in meta["leaks"]:
        red = ("\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "")
        notes.insert(0, f"{red[0]}LEAK, these figures are not held out: {leak}{red[1]}")
    if report["hit_at_k"]:
        hits = "  ".join(f"Hit@{size} {value:.3f}" for size, value in report["hit_at_k"].items())
        notes.append(f"At the top-KL points of {meta['eval_labels']}: {hits}")
    if report.get("fidelity"):
        notes += describe(report["fidelity"])
    return "\n".join([*text, "", *notes])


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def check_folder(name: str, value: str | None) -> None:
    """A path that is not there fails at once; `name` or `owner/name` may be on the Hub."""
    looks_local = value is not None and (value.startswith((".", "/", "~")) or value.count("/") > 1)
    if looks_local and not Path(value).expanduser().exists():
        raise FileNotFoundError(f"`{name}`: {value!r} does not exist.")


def evaluate(args: EvaluateArguments) -> dict:
    """Runs what is not on disk yet, writes `report.json` and returns it."""
    # 1. everything that can be wrong, before a model is loaded
    tuned = parse_tuned(args.tuned)
    sources = [("model", args.model), ("teacher_model", args.teacher_model), ("dataset", args.dataset)]
    sources += [("prior_labels", args.prior_labels), *(("adapters", path) for path in args.adapters)]
    for name, value in sources + [("tuned", path) for paths in tuned.values() for path in paths]:
        check_folder(name, value)
        if name in ("model", "teacher_model") and value is not None:
            check_model(name, value)
        elif name == "tuned":
            check_tuned(name, value, "name it in `adapters`")
    thresholds_from = args.thresholds_from or (args.adapters[0] if args.adapters else None)
    of_others = SelectorConfig.from_pretrained(thresholds_from) if thresholds_from else None
    thresholds = of_others.thresholds if of_others is not None else {}
    configs = [SelectorConfig.from_pretrained(path) for path in args.adapters]
    has_router = of_others is not None and all(config.router for config in [of_others, *configs])
    policies = choose_policies(args, bool(thresholds), has_router)
    by_length = args.batch_by == "greedy_length" and policies[0] == Policy("greedy")  # else nothing tells the lengths
    for policy in policies:
        if policy.trigger is not None:
            for table in [config.thresholds for config in configs] if policy.is_local else [thresholds]:
                policy.decoding_config(args).resolve_threshold(table)
    problems = load_problems(
        args.dataset,
        split=args.split,
        prompt_column=args.prompt_column,
        answer_column=args.answer_column,
        limit=args.limit,
    )
    if not problems:
        raise ValueError(f"`dataset`: {args.dataset!r} holds no problems in split {args.split!r}.")
    if unanswered := [problem.id for problem in problems if problem.answer is None]:
        raise ValueError(
            f"`dataset`: {len(unanswered)} of {len(problems)} problems have no answer in column "
            f"{args.answer_column!r} (first id {unanswered[0]}): there is nothing to check against."
        )
    leaks: list[str] = []

    def guard(check: Callable[[], None]) -> None:
        try:
            check()
        except ValueError as error:
            if not args.allow_leaks:
                raise ValueError(
                    f"{error} (`--allow_leaks true` measures all the same, and the report says so.)"
                ) from None
            leaks.append(str(error))

    check_same_prompts(args)
    guard(lambda: check_no_leak(problems, args.label_dirs))
    if args.prior_labels is not None:
        guard(lambda: check_no_leak(problems, [args.prior_labels], "prior_labels"))
    trained = [*args.adapters, *(path for paths in tuned.values() for path in paths)]
    for path in dict.fromkeys([*trained, *filter(None, [args.thresholds_from])]):
        guard(partial(check_unseen, path, [problem.id for problem in problems], STAGES, "dataset"))
    held_out, hit_at_k, agree_at_1 = None, {}, {}
    if args.eval_labels:
        held_out = open_labels(args.eval_labels, configs)
        for path in args.adapters:
            guard(partial(check_unseen, path, held_out.rows["problem_id"], STAGES, "eval_labels"))
        hit_at_k, agree_at_1 = measure_hits(held_out, args.num_candidates)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.teacher_model is not None:
        check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(args.teacher_model))
    prior = None if args.prior_labels is None else read_prior(args.prior_labels, tokenizer)
    zero_shot_id = None if args.zero_shot_text is None else first_token(args.zero_shot_text, tokenizer)
    device = default_device()
    bench = Bench(args, problems, tokenizer, device)
    for name in filter(None, (args.model, args.teacher_model)):
        text_config = AutoConfig.from_pretrained(name).get_text_config()
        bench.check_length(getattr(text_config, "max_position_embeddings", None))

    # 2. what is on disk already
    common = {
        "version": __version__,
        "records": RECORDS_FORMAT,
        "model": fingerprint(args.model),
        "problems": hash_of([asdict(problem) for problem in problems]),
        "answer_style": args.answer_style,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": device.type,
        **{name: getattr(args, name) for name in PROMPT_SETTINGS},
    }
    teacher_print = None if args.teacher_model is None else fingerprint(args.teacher_model)
    adapter_prints = [fingerprint(path) for path in args.adapters]

    def settings_of(policy: Policy, seed: int | None) -> dict:
        settings = common | {"policy": policy.label}
        if policy.num_votes and args.batch_by == "greedy_length" or by_length and policy.name != "greedy":
            settings["batch_by"] = args.batch_by
        if policy.needs_teacher:
            settings["teacher_model"] = teacher_print
        if policy.num_votes:
            settings |= {"temperature": args.temperature, "seed": args.seed}
        if policy.name == "prior":
            settings["prior"] = hash_of(sorted(prior.items()))
        if policy.name == "zero-shot":
            settings["zero_shot_text"] = args.zero_shot_text
        if policy.trigger is not None:
            config = policy.decoding_config(args)
            table = thresholds if seed is None else configs[seed].thresholds
            settings |= asdict(config) | {"threshold": config.resolve_threshold(table)}
        if policy.is_tuned:
            settings["adapter"] = fingerprint(tuned[policy.name][seed])
        elif seed is not None:
            settings["adapter"] = adapter_prints[seed]
        elif policy.trigger == "router":
            settings["router"] = of_others.router
        return settings

    def seeds_of(policy: Policy) -> Iterable[int | None]:
        if policy.is_tuned:
            return range(len(tuned[policy.name]))
        return range(len(args.adapters)) if policy.is_local else (None,)

    jobs = [(policy, seed) for policy in policies for seed in seeds_of(policy)]
    settings = {job: settings_of(*job) for job in jobs}
    done = {job: read_records(record_file(args, *job), hash_of(settings[job])) for job in jobs}
    todo = [job for job in jobs if done[job] is None]

    # 3. the rest, adapter by adapter: every adapter gets a base model of its own
    run_id = f"{time.time():.6f}"
    if todo:
        teacher = None
        if any(policy.needs_teacher for policy, _ in todo):
            teacher = load_model(args.teacher_model, args.dtype, device)
        bar = tqdm(total=len(todo) * len(problems), unit="problem", desc="load model", smoothing=0.05)
        # (name of a tuned adapter, seed): jobs that share a model in memory
        families = dict.fromkeys((policy.name if policy.is_tuned else None, seed) for policy, seed in todo)
        for family in sorted(families, key=lambda family: (family[0] or "", -1 if family[1] is None else family[1])):
            batch = [job for job in todo if (job[0].name if job[0].is_tuned else None, job[1]) == family]
            tuned_name, seed = family
            model = load_model(args.model, args.dtype, device)
            local = None
            if tuned_name is not None:
                model = merge_adapter(model, tuned[tuned_name][seed], "tuned")
            elif seed is not None:
                local = LocalSelector.from_pretrained(args.adapters[seed], model, adapter_name=f"s2t_{seed}")
            warm_up(model, bench)
            for job in batch:
                policy = job[0]
                if by_length and policy.name != "greedy":
                    bench.expect_lengths(done[Policy("greedy"), None][1])
                bar.set_description(policy.label + ("" if seed is None else f" adapter {seed}"))
                selector = local
                if not policy.is_local:
                    selector = make_selector(policy, args, thresholds, model, teacher, prior, zero_shot_id)
                if policy.trigger == "router" and not policy.is_local:
                    selector.router = Router.from_pretrained(thresholds_from, model, expected=of_others.router)
                runner = teacher if policy.name == "teacher" else model
                totals, records = bench.run(policy, runner, selector, teacher, bar)
                header = {
                    "settings_hash": hash_of(settings[job]),
                    "run_id": run_id,
                    "settings": settings[job],
                    "totals": totals,
                }
                write_records(record_file(args, *job), header, records)
                done[job] = read_records(record_file(args, *job))
            del model, local
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        bar.set_description("evaluate")
        bar.close()

    # 4. the selectors at labelled points
    fidelity = None
    if held_out is not None and args.adapters:
        fidelity = measure_fidelity(
            Path(args.output_dir),
            args.adapters,
            held_out,
            partial(load_model, args.model, args.dtype, device),
            args.num_candidates,
            args.min_prob_ratio,
            {name: common[name] for name in ("model", "dtype", "device")},
            args.seed,
        )

    # 5. the report
    results = {
        policy: [done[job] for job in jobs if job[0] == policy] for policy in policies
    }  # policy -> [(header, records)] over its seeds
    greedy = results.get(Policy("greedy"), [None])[0]
    metrics = local_agreement(configs)
    report = {
        "meta": {
            "model": args.model,
            "teacher_model": args.teacher_model,
            "adapters": args.adapters,
            "dataset": args.dataset,
            "split": args.split,
            "num_problems": len(problems),
            "num_seeds": len(args.adapters),
            "eval_labels": args.eval_labels,
            "settings": asdict(args),
            "thresholds": {
                trigger: {f"{rate:g}": value for rate, value in table.items()} for trigger, table in thresholds.items()
            },
            "fusion": [None if config.fusion is None else asdict(config.fusion) for config in configs],
            "selector_metrics": metrics,
            "definitions": DEFINITIONS,
            "leaks": leaks,
            "device": str(device),
            "versions": versions(),
            "command": shlex.join(["python", *sys.argv]),
        },
        "rows": [row for policy in policies for row in make_rows(policy, results[policy], greedy, args, configs)],
        "hit_at_k": hit_at_k,
        # student and second at the top-KL points; the selector's figures at all its held-out decision points
        "agree_at_1": agree_at_1 | ({"held_out": metrics} if metrics else {}),
        "fidelity": fidelity,
        "examples": pick_examples(tokenizer, problems, results, args.num_examples),
    }
    texts = collect_texts(problems, tokenizer, [records for _, records in done.values()])
    write_json(Path(args.output_dir) / TEXTS_NAME, texts)
    write_json(Path(args.output_dir) / "report.json", report)
    return report


def warm_up(model: PreTrainedModel, bench: Bench) -> None:
    """A few tokens nobody times: the first call pays for what the process sets up once."""
    inputs = pad_prompts([bench.prompt_ids[i] for i in bench.order[:2]], bench.pad_token_id)
    inputs = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=bench.pad_token_id)


def versions() -> dict[str, str]:
    import peft
    import transformers

    libraries = {"torch": torch, "transformers": transformers, "peft": peft}
    return {
        "python": platform.python_version(),
        "transformers_s2t": __version__,
        **{name: module.__version__ for name, module in libraries.items()},
    }


def main() -> None:
    from transformers.utils import logging
    from trl import TrlParser

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    logging.disable_progress_bar()  # of loading weights: it would cut through the one bar of the evaluation
    (args,) = TrlParser(EvaluateArguments).parse_args_and_config()
    report = evaluate(args)
    print()
    print(format_table(report))
    print(f"\nReport: {Path(args.output_dir) / 'report.json'}")
