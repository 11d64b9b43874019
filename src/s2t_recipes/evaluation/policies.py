"""Policies, the ways of decoding that are compared: how they are written, and what each needs.

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
fire. Knows arguments; knows no models and no problems.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from s2t_recipes.evaluation.arguments import EvaluateArguments
from transformers_s2t import FusionWeights, S2TDecodingConfig
from transformers_s2t.config import THRESHOLD_TRIGGERS


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

    def record_name(self, seed: int | None) -> str:
        """File of the records with one adapter; `seed` is `None` for a policy without adapters."""
        return self.label.replace(":", "_") + ("" if seed is None else f"_adapter{seed}") + ".jsonl"

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
        """Fusion weights: `None`, the adapter's own, for s2t-local; else those of the selector's score alone."""
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


#: What every other policy is compared with.
GREEDY = Policy("greedy")


def parse_tuned(texts: list[str]) -> dict[str, list[str]]:
    """Name -> folders, one per seed, from texts `name=folder`.

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
            return "a router in every adapter (s2t route)"
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
