"""Compares ways of decoding on the same problems with the same settings, and prints one table with intervals.

    s2t eval --model M --teacher_model T --adapters RUN/adapter-seed0 RUN/adapter-seed1 \
        --dataset test.jsonl --output_dir RUN

An evaluation is read from top to bottom in arguments.py, policies.py (how a policy is written), plan.py (what is read
and decided before a model is loaded), here, bench.py (how one policy is run) and rows.py (figures and the report).
Every finished policy is kept in OUTPUT_DIR/records; running again with the same settings only runs what is missing.
With --eval_labels the adapters are compared with the teacher at labelled points too (fidelity.py). `s2t report`
makes a page of OUTPUT_DIR.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import groupby
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from s2t_recipes.adapters import merge_adapter
from s2t_recipes.evaluation.arguments import EvaluateArguments
from s2t_recipes.evaluation.controls import (
    PriorSelector,
    RandomCandidateSelector,
    SecondCandidateSelector,
    ZeroShotSelector,
)
from s2t_recipes.evaluation.fidelity import measure_fidelity
from s2t_recipes.evaluation.plan import Job, Plan, make_plan
from s2t_recipes.evaluation.policies import GREEDY
from s2t_recipes.evaluation.rows import Run, format_table, make_report
from s2t_recipes.models import free_memory, load_model, load_quietly
from s2t_recipes.options import Parser
from s2t_recipes.records import fingerprint, read_records, write_records
from s2t_recipes.texts import TEXTS_NAME, collect_texts
from transformers_s2t import LocalSelector, Selector, TeacherSelector
from transformers_s2t.files import write_json
from transformers_s2t.router import Router


def evaluate(args: EvaluateArguments) -> dict:
    """Runs what is not on disk yet, writes `report.json` and returns it.

    Raises:
        FileNotFoundError, ValueError: before a model is loaded, see [`plan.make_plan`].
    """
    plan = make_plan(args)
    runs = run_jobs(plan)
    fidelity = compare_with_teacher(plan)
    report, folder = make_report(plan, runs, fidelity), Path(args.output_dir)
    texts = collect_texts(plan.bench.problems, plan.bench.tokenizer, [records for _, records in runs.values()])
    write_json(folder / TEXTS_NAME, texts)
    write_json(folder / "report.json", report)
    return report


def run_jobs(plan: Plan) -> dict[Job, Run]:
    """Header and records of every job; what is on disk with the same settings is read, the rest is run."""
    runs = {job: read_records(job.file, job.settings_hash) for job in plan.jobs}
    todo = [job for job in plan.jobs if runs[job] is None]
    if not todo:
        return runs
    run_id = f"{time.time():.6f}"
    teacher = None
    if any(job.policy.needs_teacher for job in todo):
        teacher = load_model(plan.args.teacher_model, plan.args.dtype, plan.bench.device)
    total = len(todo) * len(plan.bench.problems)
    with tqdm(total=total, unit="problem", desc="load model", smoothing=0.05) as bar:
        for _, jobs in groupby(sorted(todo, key=shared_model), key=shared_model):
            run_family(plan, list(jobs), teacher, runs, run_id, bar)
            free_memory()
        bar.set_description("evaluate")
    return runs


def shared_model(job: Job) -> tuple[str, int]:
    """Equal for jobs that share a model in memory: every adapter gets a base model of its own."""
    return job.policy.name if job.policy.is_tuned else "", -1 if job.seed is None else job.seed


def run_family(
    plan: Plan, jobs: list[Job], teacher: PreTrainedModel | None, runs: dict[Job, Run | None], run_id: str, bar: tqdm
) -> None:
    """Runs jobs that share a model, one after the other, and puts each into `runs` and on disk."""
    bench, first = plan.bench, jobs[0]
    model, local = load_model(plan.args.model, plan.args.dtype, bench.device), None
    if first.policy.is_tuned:
        model = merge_adapter(model, first.adapter, "tuned")
    elif first.adapter is not None:
        local = LocalSelector.from_pretrained(first.adapter, model, adapter_name=f"s2t_{first.seed}")
    bench.warm_up(model)
    for job in jobs:
        policy, lengths = job.policy, None
        bar.set_description(policy.label + ("" if job.seed is None else f" adapter {job.seed}"))
        if plan.by_length and policy != GREEDY:
            (greedy,) = (run for other, run in runs.items() if other.policy == GREEDY)
            lengths = [record["num_tokens"] for record in greedy[1]]
        selector = local if policy.is_local else make_selector(plan, job, model, teacher)
        writer = teacher if policy.name == "teacher" else model
        totals, records = bench.run(policy, writer, job.config, selector, teacher, lengths, bar)
        header = {"settings_hash": job.settings_hash, "run_id": run_id, "settings": job.settings, "totals": totals}
        write_records(job.file, header, records)
        runs[job] = read_records(job.file)


def make_selector(plan: Plan, job: Job, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Selector | None:
    """The selector of a policy that needs no adapter; `None` for plain decoding."""
    name, thresholds = job.policy.name, plan.selectors.thresholds
    if name in ("takeover", "s2t"):
        selector = TeacherSelector(teacher, thresholds, takeover=name == "takeover")
    elif name == "second":
        selector = SecondCandidateSelector(thresholds)
    elif name == "random":
        selector = RandomCandidateSelector(plan.args.seed, thresholds)
    elif name == "prior":
        selector = PriorSelector(plan.prior, thresholds)
    elif name == "zero-shot":
        selector = ZeroShotSelector(model, plan.zero_shot_id, thresholds)
    else:
        return None
    if job.policy.trigger == "router":
        adapters = plan.selectors
        selector.router = Router.from_pretrained(adapters.shared_path, model, expected=adapters.shared.router)
    return selector


def compare_with_teacher(plan: Plan) -> dict | None:
    """The adapters' agreement with the teacher at labelled points; `None` without labels or adapters."""
    if plan.held_out is None or not plan.selectors.paths:
        return None
    args, device = plan.args, plan.bench.device
    return measure_fidelity(
        Path(args.output_dir),
        plan.selectors.paths,
        plan.held_out,
        partial(load_model, args.model, args.dtype, device),
        args.num_candidates,
        args.min_prob_ratio,
        {"model": fingerprint(args.model), "dtype": args.dtype, "device": device.type},
        args.seed,
    )


def main() -> None:
    load_quietly()
    (args,) = Parser(EvaluateArguments).parse_args_and_config()
    report = evaluate(args)
    print()
    print(format_table(report))
    print(f"\nReport: {Path(args.output_dir) / 'report.json'}")
