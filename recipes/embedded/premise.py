"""Measure on the embedded pair whether the premise of Select to Think holds, and what each trigger could reach.

    python recipes/embedded/premise.py --split tuning --output recipes/embedded/premise.json
    python recipes/embedded/premise.py --student small --output recipes/embedded/premise_small.json

Nothing here is trained, and nothing comes from `transformers_s2t`: this is an independent check. Every decoding is
greedy except Maj@8. A step *fires* when its trigger value reaches a threshold, the quantile over greedy rollouts on
the split `calibration`; the first three new tokens never fire and do not count in the quantile. At a step that fires,
one of the student's top-8 candidates with a probability of at least 0.05 of the best takes the place of the first.

Shapes: B rows, T tokens, V vocabulary, K candidates, N new tokens, P pairs of a row and a candidate.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast


TRIGGERS = ("kl", "entropy", "margin")
RATES = (0.05, 0.10, 0.20)
HIT_SIZES = (1, 2, 4, 8, 16)
NUM_CANDIDATES = 8
CANDIDATE_FLOOR = 0.05
ENTROPY_SUPPORT = 64
FIRST_STEP = 3
MAX_NEW_TOKENS = 72
NUM_VOTES = 8
VOTE_TEMPERATURE = 0.7


@dataclass
class Step:
    """One step of all rows: log-probabilities of both models and the text so far."""

    student_logp_BV: torch.Tensor
    teacher_logp_BV: torch.Tensor
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor


@dataclass
class Rollout:
    """New tokens, EOS included (pad behind it), and what was measured at each of them."""

    ids_BN: torch.Tensor
    alive_BN: torch.Tensor
    fired_BN: torch.Tensor
    measured: dict[str, torch.Tensor] = field(default_factory=dict)


# Candidate tokens at a step: the student's first K, in its order; a mask tells which pass the floor.
Selector = Callable[[Step, torch.Tensor, torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Triggers: the larger the value, the sooner a step fires


def kl_value(step: Step) -> torch.Tensor:
    """KL(teacher || student)."""
    return (step.teacher_logp_BV.exp() * (step.teacher_logp_BV - step.student_logp_BV)).sum(-1)


def entropy_value(step: Step) -> torch.Tensor:
    """Entropy of the student over its renormalised top-64."""
    logp_BK = step.student_logp_BV.topk(min(ENTROPY_SUPPORT, step.student_logp_BV.shape[-1])).values.log_softmax(-1)
    return -(logp_BK.exp() * logp_BK).sum(-1)


def margin_value(step: Step) -> torch.Tensor:
    """log p2 - log p1 of the student: close to 0 where it is undecided."""
    top_B2 = step.student_logp_BV.topk(2).values
    return top_B2[:, 1] - top_B2[:, 0]


TRIGGER_VALUES = {"kl": kl_value, "entropy": entropy_value, "margin": margin_value}


def teacher_rank(step: Step) -> torch.Tensor:
    """The rank, from 0, of the teacher's first token in the student's order."""
    best_B1 = step.teacher_logp_BV.argmax(-1, keepdim=True)
    return (step.student_logp_BV > step.student_logp_BV.gather(1, best_B1)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Selectors: the index, among the candidates, of the one to take


def candidates(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    logp_BK, ids_BK = step.student_logp_BV.topk(NUM_CANDIDATES)
    return ids_BK, logp_BK.exp() >= CANDIDATE_FLOOR * logp_BK[:, :1].exp()


def teacher_selects(step: Step, ids_BK: torch.Tensor, floor_BK: torch.Tensor) -> torch.Tensor:
    return step.teacher_logp_BV.gather(1, ids_BK).masked_fill(~floor_BK, -torch.inf).argmax(-1)


def second_selects(step: Step, ids_BK: torch.Tensor, floor_BK: torch.Tensor) -> torch.Tensor:
    """The student's second token, floor or not."""
    return torch.ones_like(ids_BK[:, 0])


def floored_second_selects(step: Step, ids_BK: torch.Tensor, floor_BK: torch.Tensor) -> torch.Tensor:
    """The student's second token where it passes the floor."""
    return floor_BK[:, 1].long()


def doubt_selector(student: PreTrainedModel, doubt_token_id: int) -> Selector:
    """The candidate behind which the student is the least likely to write `?`."""

    def select(step: Step, ids_BK: torch.Tensor, floor_BK: torch.Tensor) -> torch.Tensor:
        doubt_BK = torch.full(ids_BK.shape, torch.inf)
        rows, places = floor_BK.nonzero(as_tuple=True)
        ids_PT = torch.cat([step.ids_BT[rows], ids_BK[rows, places][:, None]], dim=1)
        mask_PT = torch.cat([step.mask_BT[rows], step.mask_BT.new_ones(len(rows), 1)], dim=1)
        output = student(ids_PT, attention_mask=mask_PT, position_ids=positions(mask_PT), logits_to_keep=1)
        doubt_BK[rows, places] = output.logits[:, -1].log_softmax(-1)[:, doubt_token_id]
        return doubt_BK.argmin(-1)

    return select


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def positions(mask_BT: torch.Tensor) -> torch.Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


class CachedModel:
    """A model with the cache of one batch; gives the log-probabilities of the next token."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = DynamicCache(config=model.config)

    def __call__(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        new = slice(self.cache.get_seq_length(), None)
        logits_BTV = self.model(
            ids_BT[:, new],
            attention_mask=mask_BT,
            position_ids=positions(mask_BT)[:, new],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_BTV[:, -1].float().log_softmax(-1)


@dataclass
class Pair:
    """Both models, the tokenizer and the ways to run them on prompts."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, directory: Path, student: str = "student") -> "Pair":
        models = [
            AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()
            for name in (student, "teacher")
        ]
        return cls(*models, AutoTokenizer.from_pretrained(directory / student))

    @torch.no_grad()
    def decode(
        self,
        prompts: list[str],
        trigger: str = "never",
        threshold: float = 0.0,
        selector: Selector = teacher_selects,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        measure: bool = False,
        by_teacher: bool = False,
    ) -> Rollout:
        """Student decoding with interventions; with `by_teacher` both models are the teacher."""
        batch = self.tokenizer(prompts, padding=True, return_tensors="pt")
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        student = CachedModel(self.teacher if by_teacher else self.student)
        teacher = CachedModel(self.teacher)
        needs_teacher = measure or trigger != "never"
        alive_B = torch.ones(len(prompts), dtype=torch.bool)
        new_ids, alives, fires = [], [], []
        measured = {name: [] for name in (*TRIGGERS, "rank")} if measure else {}
        for n in range(MAX_NEW_TOKENS):
            student_logp_BV = student(ids_BT, mask_BT)
            teacher_logp_BV = teacher(ids_BT, mask_BT) if needs_teacher else student_logp_BV
            step = Step(student_logp_BV, teacher_logp_BV, ids_BT, mask_BT)
            for name, values in measured.items():
                values.append((teacher_rank if name == "rank" else TRIGGER_VALUES[name])(step))
            if temperature > 0:
                next_B = torch.multinomial((student_logp_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                next_B = student_logp_BV.argmax(-1)
            fired_B = torch.zeros_like(alive_B)
            if trigger != "never" and n >= FIRST_STEP:
                fired_B = alive_B if trigger == "always" else alive_B & (TRIGGER_VALUES[trigger](step) >= threshold)
                if fired_B.any():
                    ids_BK, floor_BK = candidates(step)
                    chosen_B = ids_BK.gather(1, selector(step, ids_BK, floor_BK)[:, None])[:, 0]
                    next_B = torch.where(fired_B, chosen_B, next_B)
            next_B = next_B.masked_fill(~alive_B, self.tokenizer.pad_token_id)
            new_ids.append(next_B)
            alives.append(alive_B)
            fires.append(fired_B)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
            mask_BT = torch.cat([mask_BT, alive_B[:, None].long()], dim=1)
            alive_B = alive_B & (next_B != self.tokenizer.eos_token_id)
            if not alive_B.any():
                break
        stacked = {name: torch.stack(values, 1) for name, values in measured.items()}
        return Rollout(torch.stack(new_ids, 1), torch.stack(alives, 1), torch.stack(fires, 1), stacked)

    def answers(self, rollout: Rollout) -> list[str | None]:
        texts = self.tokenizer.batch_decode(rollout.ids_BN, skip_special_tokens=True)
        return [corpus.parse_answer(text) for text in texts]


def counting_steps(rollout: Rollout) -> torch.Tensor:
    """Where a trigger may fire."""
    counts_BN = rollout.alive_BN.clone()
    counts_BN[:, :FIRST_STEP] = False
    return counts_BN


def calibrate(rollout: Rollout) -> dict[str, dict[float, float]]:
    """Thresholds by trigger and rate."""
    counts_BN = counting_steps(rollout)
    return {
        name: {rate: rollout.measured[name][counts_BN].quantile(1 - rate).item() for rate in RATES}
        for name in TRIGGERS
    }


def majority(votes: list[str | None]) -> str | None:
    """The commonest answer, the first seen in a tie; what could not be read does not vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    return counts.most_common(1)[0][0] if counts else None


# ---------------------------------------------------------------------------------------------------------------------
# The report


def score(pair: Pair, rows: list[dict], rollout: Rollout, reference: list[bool] | None = None) -> dict:
    """Accuracy in per cent, the share of steps that fired, and the problems won and lost against `reference`."""
    right = [answer == row["answer"] for answer, row in zip(pair.answers(rollout), rows, strict=True)]
    counts_BN = counting_steps(rollout)
    report = {
        "accuracy": round(100 * sum(right) / len(right), 1),
        "fired": round(100 * rollout.fired_BN.sum().item() / counts_BN.sum().item(), 1),
    }
    if reference is not None:
        report["helped"] = sum(now and not before for now, before in zip(right, reference, strict=True))
        report["hurt"] = sum(before and not now for now, before in zip(right, reference, strict=True))
    return report


def measure_premise(pair: Pair, rows: list[dict], calibration_rows: list[dict], seed: int) -> dict:
    prompts = [row["prompt"] for row in rows]
    thresholds = calibrate(pair.decode([row["prompt"] for row in calibration_rows], measure=True))
    greedy = pair.decode(prompts, measure=True)
    right = [answer == row["answer"] for answer, row in zip(pair.answers(greedy), rows, strict=True)]

    generator = torch.Generator().manual_seed(seed)
    samples = [
        pair.answers(pair.decode(prompts, temperature=VOTE_TEMPERATURE, generator=generator)) for _ in range(NUM_VOTES)
    ]
    votes = [majority(list(answers)) for answers in zip(*samples, strict=True)]
    num_voted = sum(vote == row["answer"] for vote, row in zip(votes, rows, strict=True))
    hits_at = counting_steps(greedy) & (greedy.measured["kl"] >= thresholds["kl"][0.10])
    ranks = greedy.measured["rank"][hits_at]

    def run(trigger: str, rate: float | None, selector: Selector) -> dict:
        threshold = 0.0 if rate is None else thresholds[trigger][rate]
        return score(pair, rows, pair.decode(prompts, trigger, threshold, selector), right)

    doubt = doubt_selector(pair.student, pair.tokenizer.convert_tokens_to_ids("?"))
    return {
        "num_problems": len(rows),
        "student_greedy": score(pair, rows, greedy)["accuracy"],
        "teacher_greedy": score(pair, rows, pair.decode(prompts, by_teacher=True))["accuracy"],
        "majority_of_8": round(100 * num_voted / len(rows), 1),
        "tokens_per_solution": round(greedy.alive_BN.sum().item() / len(rows), 1),
        "hits_at_kl_10": {str(size): round((ranks < size).float().mean().item(), 3) for size in HIT_SIZES},
        "teacher_selects": {
            **{f"{name} {rate:.0%}": run(name, rate, teacher_selects) for name in TRIGGERS for rate in RATES},
            "every step": run("always", None, teacher_selects),
        },
        "controls": {
            f"{label}, {name} 10%": run(name, 0.10, selector)
            for label, selector in {
                "second candidate": second_selects,
                "second candidate above the floor": floored_second_selects,
                "lowest P(?)": doubt,
            }.items()
            for name in TRIGGERS
        },
        "thresholds": {name: {f"{rate:.0%}": value for rate, value in t.items()} for name, t in thresholds.items()},
    }


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Measure the premise of Select to Think on the embedded pair.")
    parser.add_argument("--models", type=Path, default=here, help="parent of student/ and teacher/ (default: here)")
    parser.add_argument("--student", default="student", help="folder of the student in there (default: student)")
    parser.add_argument("--split", choices=list(corpus.SPLIT_SHARES), default="tuning", help="default: tuning")
    parser.add_argument("--num-problems", type=int, default=300, help="default: 300")
    parser.add_argument("--num-calibration", type=int, default=300, help="default: 300")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems and samples (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.split == "calibration":
        parser.error("`--split` must not be calibration: the thresholds come from it")
    torch.set_num_threads(1)
    rows = corpus.build_split(args.split, args.num_problems, args.seed)
    calibration_rows = corpus.build_split("calibration", args.num_calibration, args.seed)
    pair = Pair.load(args.models, args.student)
    report = {"split": args.split, **measure_premise(pair, rows, calibration_rows, args.seed)}
    text = json.dumps(report, indent=2) + "\n"
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
