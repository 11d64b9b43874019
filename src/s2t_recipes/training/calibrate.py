"""Calibrates a trained selector on held-out training problems: fusion weights, then trigger thresholds.

    s2t calibrate --adapter runs/demo/adapter-seed0 --labels runs/demo/labels/calibration

Writes both into the s2t_config.json of the adapter, or of a copy (`--output_dir`), so that
S2TDecodingConfig(trigger="margin", target_rate=0.01) just works, and what was measured into calibration.json beside
it. Fusion weights come from the labels, which hold what the teacher said. Thresholds come from running what will be
deployed (adapter, scope, fusion, dtype) on the labels' prompts: corrected text is less in doubt than the student's
own. A third of the problems is kept out of that and tells which rates are reached on others.

Problems that the selector was trained on are refused. Never calibrate on evaluation problems: the ids are noted in
seen_problems.json, and `s2t eval` and agreement.py refuse them.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from transformers.hf_argparser import HfArg

from s2t_recipes.adapters import base_model_of, check_model, check_same_tokenizer, open_adapter, still_calibrated
from s2t_recipes.commands import typed_command
from s2t_recipes.models import default_device, load_model, padding_token_id
from s2t_recipes.options import Parser, check_least
from transformers_s2t import FusionWeights, LocalSelector, S2TDecodingConfig, SelectorConfig
from transformers_s2t.calibration.scored_points import (
    TARGET_RATES,
    ScoredPoints,
    calibrate_on_labels,
    fit_fusion_to_points,
    read_router,
    score_labels,
)
from transformers_s2t.calibration.thresholds import MAX_RUNS, Deployment, calibrate_by_decoding
from transformers_s2t.config import CALIBRATION_NAME, DEFAULT_WARMUP_TOKENS, S2T_CONFIG_NAME
from transformers_s2t.files import atomic_write, write_json
from transformers_s2t.labels.folder import read_held_out_labels, share_of
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import check_unseen, read_seen_problems, write_seen_problems
from transformers_s2t.reserved_tokens import check_same_vocabulary
from transformers_s2t.selector_card import with_calibration
from transformers_s2t.selector_files import push_selector


TRIGGERS = ("entropy", "margin", "router", "kl")
#: Fewer problems, or fewer decision points, are worth a warning.
LEAST_PROBLEMS, LEAST_POINTS = 20, 200


@dataclass
class CalibrateArguments:
    """What is calibrated, and on what.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    adapter: str = HfArg(help="Folder of the trained adapter, into which the result is written.")
    labels: str = HfArg(help="Labels of held-out training problems (`s2t label`); their split 'validation', if any.")
    model: str | None = HfArg(default=None, help="Base model (default: the one that the adapter names).")
    teacher_model: str | None = HfArg(
        default=None,
        help="Large model, for thresholds of the 'kl' trigger under the deployed selector (default: none, these "
        "thresholds come from the labels' text).",
    )
    triggers: list[str] | None = HfArg(
        default=None, help="Triggers among entropy, margin, router and kl (default: all that are possible)."
    )
    target_rates: list[float] = HfArg(
        default_factory=lambda: list(TARGET_RATES), help="Shares of generated tokens that trigger, in (0, 1]."
    )
    deployed: bool = HfArg(
        default=True, help="false: thresholds from the labels' text, which takes no decoding, and fires too rarely."
    )
    check_share: float = HfArg(
        default=0.33, help="Share of the problems, in [0, 1), on which the achieved rates are measured; 0 for none."
    )
    limit: int | None = HfArg(default=None, help="Number of problems to decode (all are used for fusion).")
    max_new_tokens: int | None = HfArg(default=None, help="Largest number of new tokens (default: as labelled).")
    warmup_tokens: int = HfArg(default=DEFAULT_WARMUP_TOKENS, help="Number of first new tokens that never trigger.")
    batch_size: int = HfArg(default=32, help="Trajectories per forward.")
    dtype: str = HfArg(default="auto", help="Type of the weights, the one that is deployed.")
    deploy: str | None = HfArg(
        default=None,
        help="How a call selects that says nothing itself: always, or a trigger and one of `target_rates`, as in "
        "router:0.05 (default: what it was, or always).",
    )
    output_dir: str | None = HfArg(default=None, help="Folder for a calibrated copy; `adapter` then stays as it is.")
    push_to_hub: str | None = HfArg(default=None, help="Hub repository (you/name) for the calibrated adapter.")

    def __post_init__(self):
        for trigger in self.triggers or ():
            if trigger not in TRIGGERS:
                raise ValueError(f"`triggers` must be among {', '.join(map(repr, TRIGGERS))}, got {trigger!r}.")
        if not self.target_rates or not all(0 < rate <= 1 for rate in self.target_rates):
            raise ValueError(f"`target_rates` must be in (0, 1], got {self.target_rates}.")
        if not 0 <= self.check_share < 1:
            raise ValueError(f"`check_share` must be in [0, 1), got {self.check_share!r}.")
        check_least(self, limit=1, max_new_tokens=1, batch_size=1, warmup_tokens=0)
        if self.deploy is not None:
            policy = self.policy()
            rates = [rate for rate in self.target_rates if policy.target_rate == rate or policy.trigger == "always"]
            known = ("always", *(self.triggers or TRIGGERS))
            if policy.trigger not in known or policy.trigger == "kl" or not rates:
                raise ValueError(
                    "`deploy` must be always, or a trigger that is calibrated and needs no teacher with one of "
                    f"`target_rates` {self.target_rates}, got {self.deploy!r}."
                )

    def policy(self) -> S2TDecodingConfig:
        """What `deploy` says."""
        trigger, _, rate = self.deploy.partition(":")
        try:
            return S2TDecodingConfig(trigger=trigger, target_rate=float(rate) if rate else None)
        except ValueError as error:
            raise ValueError(f"`deploy` must be always or TRIGGER:RATE, got {self.deploy!r}: {error}") from None


def choose_triggers(args: CalibrateArguments, config: SelectorConfig) -> list[str]:
    """The triggers asked for, or those that can be had.

    Raises:
        ValueError: for the router's where there is none, or the labels' values for a text that they do not hold.
    """
    from_labels = config.proposals == "base"  # labels hold the base model's text
    possible = ["entropy", "margin"] if args.deployed or from_labels else []
    if config.router:
        possible.append("router")
    if from_labels or (args.teacher_model is not None and args.deployed):
        possible.append("kl")
    wrong = [trigger for trigger in args.triggers or () if trigger not in possible]
    if wrong == ["router"]:
        raise ValueError(f"`triggers`: {args.adapter!r} has no router; `s2t route` trains one.")
    if wrong or not possible:
        raise ValueError(
            f"`triggers` can be {', '.join(possible) or 'none'} here, got {', '.join(wrong) or 'none'}: with "
            "`deployed=false` thresholds come from labels, which do not hold the text of an adapted model, and for "
            "that 'kl' needs `teacher_model`."
        )
    return args.triggers or possible


def fit_weights(
    args: CalibrateArguments, selector: LocalSelector, labels: Dataset
) -> tuple[FusionWeights | None, ScoredPoints | None, list[torch.Tensor] | None, bool]:
    """Fusion weights, the points that they were fitted on, the router's logits at every token, and whether the logits
    are cross-fitted, because the router had seen the problems."""
    config = selector.selector_config
    if config.proposals == "adapted":  # labels hold the base model's candidates and log-probabilities
        return None, None, None, False
    values, seen = None, set()
    if selector.router is not None:
        seen = read_seen_problems(args.adapter).get("router", set()) & set(labels["problem_id"])
        values = read_router(selector, labels, args.batch_size, unseen=not seen)
    points = score_labels(selector, labels, args.batch_size, router_values=values).with_choice()
    return fit_fusion_to_points(points), points, values, bool(seen)


def divide(labels: Dataset, check_share: float, limit: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts to calibrate on, and prompts of other problems to check on."""
    prompts = {}
    for id, ids, prompt_length in zip(labels["problem_id"], labels["input_ids"], labels["prompt_length"]):
        prompts.setdefault(id, ids[:prompt_length])
    if limit is not None:
        prompts = dict(list(prompts.items())[:limit])
    check = [prompt for id, prompt in prompts.items() if share_of(id) < check_share]
    fit = [prompt for id, prompt in prompts.items() if share_of(id) >= check_share]
    if not fit:
        raise ValueError(f"`labels` hold {len(prompts)} problems: none is left to calibrate on, label more.")
    return fit, check


def run_deployed(
    args: CalibrateArguments, deployment: Deployment, triggers: list[str], fit: list[list[int]], check: list[list[int]]
) -> dict[str, dict[float, dict[str, Any]]]:
    """Trigger -> target rate -> threshold and achieved rates, by decoding."""
    table: dict[str, dict[float, dict[str, Any]]] = {}
    most = len(fit) * (1 + MAX_RUNS * len(args.target_rates)) + len(check) * len(args.target_rates)
    with tqdm(total=len(triggers) * most, unit="problem") as bar:
        deployment = dataclasses.replace(deployment, on_texts=bar.update)
        for number, trigger in enumerate(triggers, 1):
            bar.set_description(f"Decoding: {trigger}")

            def tell(rate: float, run) -> None:
                bar.set_postfix_str(f"target {rate:.1%}, got {run.rate:.2%}")

            table[trigger] = {}
            for rate, run in calibrate_by_decoding(deployment, fit, trigger, args.target_rates, tell).items():
                entry = {"threshold": run.threshold, "calibrated": run.rate}
                if check:
                    checked = deployment.run(check, trigger, run.threshold)
                    entry |= {"achieved": checked.rate, "interval": checked.interval()}
                table[trigger][rate] = entry
            bar.total = bar.n + (len(triggers) - number) * most  # thresholds are often found in fewer runs
            bar.refresh()
    return table


def main(argv: list[str] | None = None) -> None:
    (args,) = Parser(CalibrateArguments).parse_args_and_config(argv)
    config = open_adapter(args.adapter)
    triggers = choose_triggers(args, config)
    if args.deploy and args.policy().trigger not in ("always", *triggers):
        raise ValueError(f"`deploy` must be always or one of the triggers {triggers}, got {args.deploy!r}.")
    labels, header = read_held_out_labels(args.labels)
    check_same_tokenizer(args.labels, header, config)
    check_unseen(args.adapter, labels["problem_id"], ("training",), "labels")
    fit, check = divide(labels, args.check_share, args.limit)
    name = base_model_of(args.adapter, config, args.model)
    check_model("model", name)
    if args.teacher_model is not None:
        check_model("teacher_model", args.teacher_model, may_be_tuned=True)
        check_same_vocabulary(*(AutoTokenizer.from_pretrained(source) for source in (name, args.teacher_model)))
    config = dataclasses.replace(config, warmup_tokens=args.warmup_tokens)

    model = load_model(name, args.dtype, default_device())
    selector = LocalSelector.from_pretrained(args.adapter, model)
    fusion, points, values, was_seen = fit_weights(args, selector, labels)
    selector.fusion = fusion  # it decides what is written, and so which values the triggers see
    from_labels = triggers if not args.deployed else ["kl"] if args.teacher_model is None and "kl" in triggers else []
    table: dict[str, dict[float, dict[str, Any]]] = {}
    if from_labels:
        stored = calibrate_on_labels(labels, args.target_rates, args.warmup_tokens, values)
        table = {t: {rate: {"threshold": value} for rate, value in stored[t].items()} for t in from_labels}
    decoded = [trigger for trigger in triggers if trigger not in from_labels]
    if decoded:
        deployment = make_deployment(args, selector, header, model, AutoTokenizer.from_pretrained(name))
        if "kl" in decoded:
            teacher = load_model(args.teacher_model, args.dtype, default_device())
            deployment = dataclasses.replace(deployment, teacher_model=teacher)
        table |= run_deployed(args, deployment, decoded, fit, check)

    folder = args.adapter
    if args.output_dir is not None:
        folder = args.output_dir
        shutil.copytree(args.adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
    write_seen_problems(folder, "calibration", labels["problem_id"])
    thresholds = {t: {rate: entry["threshold"] for rate, entry in by.items()} for t, by in table.items()}
    policy = args.policy() if args.deploy else still_calibrated(config.decoding, thresholds)
    config = dataclasses.replace(config, thresholds=thresholds, fusion=fusion, decoding=policy)
    config.save_pretrained(folder)
    measured = None if points is None else agreement(points, fusion)
    write_card(Path(folder) / "README.md", card_section(table, measured, len(check)))
    report = {
        "command": typed_command(),
        "problems": {"calibrated": len(fit), "checked": len(check)},
        "warmup_tokens": args.warmup_tokens,
        "fusion": None if fusion is None else dataclasses.asdict(fusion),
        "router_cross_fitted": was_seen,
        "in_sample_points": measured,
        "rates": {trigger: {f"{rate:g}": entry for rate, entry in by.items()} for trigger, by in table.items()},
    }
    write_json(Path(folder) / CALIBRATION_NAME, report)
    print_report(report, table, len(labels))
    for warning in warnings_of(len(fit), None if points is None else len(points.target_N), fusion):
        print(f"  warning: {warning}")
    print(f"\nwritten to {Path(folder) / S2T_CONFIG_NAME}")
    if args.push_to_hub is not None:
        push_selector(folder, args.push_to_hub, commit_message="Calibrated S2T selector")
        print(f"pushed to {args.push_to_hub}")


def make_deployment(
    args: CalibrateArguments,
    selector: LocalSelector,
    header: TrajectoryHeader | None,
    model: PreTrainedModel,
    tokenizer: Any,
) -> Deployment:
    """How texts are written: as the labels' were, but corrected.

    Raises:
        ValueError: where neither labels nor arguments say how long texts may be, or the tokenizer knows no end.
    """
    max_new_tokens = args.max_new_tokens or (header.max_new_tokens if header is not None else None)
    if max_new_tokens is None:
        raise ValueError("`max_new_tokens` must be given, for the labels have no header that says it.")
    eos = list(header.eos_token_ids) if header is not None else [tokenizer.eos_token_id]
    return Deployment(
        model=model,
        selector=selector,
        pad_token_id=padding_token_id(tokenizer, model.name_or_path),
        eos_token_ids=[id for id in eos if id is not None],
        max_new_tokens=max_new_tokens,
        batch_size=args.batch_size,
        warmup_tokens=args.warmup_tokens,
    )


def agreement(points: ScoredPoints, fusion: FusionWeights) -> dict[str, Any]:
    """Number of points with a choice, and Agree@1 and flips of each way to decide there."""
    found: dict[str, Any] = {"count": len(points.target_N)}
    found["student_first"] = {"agree_at_1": float((points.target_N == 0).float().mean())}
    for name, weights in (("selector", FusionWeights()), ("fused", fusion)):
        found[name] = {"agree_at_1": points.agreement(weights), **points.flips(weights)._asdict()}
    return found


def card_section(table, measured, num_check: int) -> str:
    """What the model card says of the calibration, in Markdown."""
    text = "Selecting at a share of the tokens: `S2TDecodingConfig(trigger=..., target_rate=...)`.\n\n"
    text += "| trigger | target rate | threshold | rate on other problems |\n|---|---|---|---|\n"
    for trigger, by_rate in table.items():
        for rate, entry in by_rate.items():
            achieved = "not measured"
            if "achieved" in entry:
                low, high = entry["interval"]
                achieved = f"{entry['achieved']:.2%} [{low:.2%}, {high:.2%}]"
            text += f"| {trigger} | {rate:.1%} | {entry['threshold']:.4f} | {achieved} |\n"
    if num_check:
        text += f"\nRates on {num_check} problems that the thresholds were not taken from, with 95 % intervals.\n"
    if measured is not None:
        before, after = measured["selector"], measured["fused"]
        text += (
            f"\nFusion weights were fitted on {measured['count']} decision points, where the fused decision puts "
            f"{after['helped']} first choices right and {after['hurt']} wrong (the bare score: {before['helped']} and "
            f"{before['hurt']}).\n"
        )
    return text


def write_card(file: Path, section: str) -> None:
    """Puts the section at the end of a model card; the section of an earlier calibration is replaced."""
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    with atomic_write(file) as out:
        out.write(with_calibration(card, section).encode())


def warnings_of(num_problems: int, num_points: int | None, fusion: FusionWeights | None) -> list[str]:
    """Sentences about a calibration that will not hold on other problems.

    Args:
        num_problems: problems that thresholds were taken from.
        num_points: decision points that weights were fitted on; `None` where none were fitted.
        fusion: fitted weights.
    """
    found = []
    if num_problems < LEAST_PROBLEMS or (num_points is not None and num_points < LEAST_POINTS):
        seen = f"{num_problems} problems" + ("" if num_points is None else f" and {num_points} decision points")
        found.append(
            f"{seen} are too few (at least {LEAST_PROBLEMS} and {LEAST_POINTS}): label more problems (s2t label) and "
            "calibrate again, or other problems will get other rates."
        )
    if fusion is not None and fusion.logprob < 0:
        found.append(
            f"the weight of the student's log-probability is negative ({fusion.logprob:.3f}), so what the student "
            "finds likely counts against a candidate: label more problems (s2t label), or train longer (s2t train)."
        )
    return found


def print_report(report: dict[str, Any], table, num_labels: int) -> None:
    measured, fusion, problems = report["in_sample_points"], report["fusion"], report["problems"]
    if measured is not None:
        print(f"\n{measured['count']} decision points with a choice, of {num_labels} trajectories")
        weights = ", ".join(f"{name} {value:.3f}" for name, value in fusion.items())
        crossed = " (router cross-fitted: it has seen these problems)" if report["router_cross_fitted"] else ""
        print(f"  fusion: {weights}{crossed}")
        print(f"\n  {'at these points':<16}{'Agree@1':>9}{'helped':>9}{'hurt':>9}{'other':>9}")
        for name in ("student_first", "selector", "fused"):
            figures = measured[name]
            flips = "".join(f"{figures.get(key, '-'):>9}" for key in ("helped", "hurt", "other"))
            print(f"  {name.replace('_', ' '):<16}{figures['agree_at_1']:>9.3f}{flips}")
    else:
        print("\nfusion stays the paper's rule: labels hold the base model's candidates, not the adapted one's")
    print(f"\nthresholds calibrated on {problems['calibrated']} problems, checked on {problems['checked']} others")
    print(f"  {'trigger':<10}{'target':>8}{'threshold':>12}{'calibrated':>12}{'achieved':>10}  95% interval")
    for trigger, by_rate in table.items():
        for rate, entry in by_rate.items():
            line = f"  {trigger:<10}{rate:>8.1%}{entry['threshold']:>12.4f}"
            if "calibrated" not in entry:
                print(line + "  from the labels' text: fires more rarely where text is corrected")
                continue
            line += f"{entry['calibrated']:>12.2%}"
            if "achieved" in entry:
                low, high = entry["interval"]
                line += f"{entry['achieved']:>10.2%}  [{low:.2%}, {high:.2%}]"
            print(line)
