"""Which recipe makes what: the jobs that lead from a pair of models to labels, selectors, baselines and evaluations.

Knows the arguments of the recipes, and which job reads what another one wrote. Knows no tables, and runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2t_recipes.commands import recipe
from s2t_recipes.jobs import Job, Jobs
from s2t_recipes.paper.pair import Pair
from s2t_recipes.paper.sweep import JUDGED_BY, BestTraining, Condition, Sweep, jobs_behind
from s2t_recipes.splits import split_command
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME


class Pipeline:
    """The jobs of one pair. Every method returns a job; asked twice for the same, it is the same job.

    Args:
        pair: models, data and settings.
        jobs, folder: run that the jobs are added to, and output folder of the pair.
        model, prefix: job that makes another student than the pair's (a tuned one, for a selector on top of it), and
            beginning of the names of everything that depends on that student.
    """

    def __init__(self, pair: Pair, jobs: Jobs, folder: Path, model: Job | None = None, prefix: str = ""):
        self.pair, self.jobs, self.folder, self.prefix = pair, jobs, folder, prefix
        self.made_model = model
        self.seeds = range(pair.num_seeds)
        self._routers: dict[tuple, Job] = {}  # what a router depends on -> the first adapter that has it
        self._taken: dict[Path, Job | None] = {}  # adapter -> whose router it takes

    def on_top_of(self, adapter: Job | BestTraining, name: str) -> Pipeline:
        """The same pair with another student: this one, with an adapter merged into it."""
        output, needs = self.folder / "merged" / name, [adapter, *self.models]
        command = [recipe("merge.py"), "--model", self.model, "--output_dir", str(output), "--dtype", self.pair.dtype]
        merged = self.add(f"merge-{name}", output, lambda: [*command, "--adapter", str(adapter.path)], needs)
        return Pipeline(self.pair, self.jobs, self.folder, merged, f"{name}-")

    @property
    def models(self) -> tuple[Job, ...]:
        """Jobs that make models."""
        return () if self.made_model is None else (self.made_model,)

    @property
    def model(self) -> str:
        return self.pair.model if self.made_model is None else str(self.made_model.path)

    @property
    def chat(self) -> dict[str, Any]:
        """How prompts are formatted, for every recipe that reads problems."""
        options = {name: getattr(self.pair, name) for name in ("system_prompt", "chat_template_kwargs")}
        options = {name: value for name, value in options.items() if value is not None}
        return {"chat_template": True, **options} if options else {}

    def add(
        self,
        name: str,
        output: Path,
        command,
        needs: Sequence[Job | Sweep | BestTraining] = (),
        folder: Path | None = None,
        only_if: Condition | None = None,
    ) -> Job:
        """A job of this pair.

        Args:
            name: end of the job's name; it begins with the pair's.
            output, command, folder: see `Job`. A command that names the best training of a sweep is a function,
                because the sweep's reports are written while jobs run.
            needs: jobs whose output it reads; a sweep or the best training of one stands for all jobs of the sweep.
            only_if: condition on which the job is run; by default it always is.
        """
        needs = [*needs, *(only_if.known_after if only_if else ())]
        flat = tuple(dict.fromkeys(job for need in needs for job in jobs_behind(need)))
        return self.jobs.add(f"{self.pair.name}-{name}", output, command, flat, folder, only_if and only_if.holds)

    def data(self, part: str) -> Job:
        """The problems of a part, a .jsonl file."""
        pair, folder = self.pair, self.folder / "data"
        if part not in pair.sizes:
            raise ValueError(f"The pair {pair.name!r} has no part {part!r}: name its size under `sizes`.")
        sizes, options = pair.sizes, ["--only", part, *pair.part_options.get(part, [])]
        command = split_command(recipe("splits.py"), pair.dataset, str(folder), sizes, pair.data_seed, options)
        return self.add(f"data-{part}", folder / f"{part}.jsonl", command)

    def labels(self, part: str, limit: int | None = None, **options) -> Job:
        """Labels of the first problems of a part.

        Args:
            part: "label" or another part of the pair.
            limit: number of problems; by default the pair's `label_problems` for "label", all for other parts.
            options: further arguments of `s2t label`; `adapter` may be a job.
        """
        if part == "label" and limit is None:
            limit = self.pair.label_problems
        data = self.data(part)
        needs = [data, *self.models]
        if isinstance(options.get("adapter"), Job):
            needs.append(options["adapter"])
            options = options | {"adapter": str(options["adapter"].path)}
        shown = {name: Path(value).name if name == "adapter" else value for name, value in options.items()}
        name = f"{self.prefix}{part}" + ("" if limit is None else str(limit)) + tag(shown)
        output = self.folder / "labels" / name
        command = [recipe("label.py"), "--model", self.model, "--teacher_model", self.pair.teacher_model]
        command += ["--dataset", str(data.path), "--output_dir", str(output)]
        shared = {"max_new_tokens": self.pair.max_new_tokens, "batch_size": self.pair.batch_size}
        shared |= {"dtype": self.pair.dtype, "limit": limit} | self.chat
        return self.add(f"labels-{name}", output, command + as_arguments(shared | self.pair.label | options), needs)

    def selector_labels(self, limit: int | None = None, **options) -> Job:
        """Labels of the part "label" as selectors learn from them; see `labels`."""
        return self.labels("label", limit, **(self.pair.selector_label | options))

    @property
    def num_rollouts(self) -> int:
        """Number of texts of each problem that selectors learn from."""
        return self.pair.selector_label.get("num_rollouts", 1)

    def selector(
        self,
        labels: Job,
        seed: int = 0,
        *,
        calibration: Job,
        route: bool = True,
        decode: bool = True,
        rate: float | Sweep | None = None,
        only_if: Condition | None = None,
        **options,
    ) -> Job:
        """An adapter: trained, with a router, calibrated.

        Args:
            labels, calibration: labels to train on, and labels to calibrate on.
            seed: seed of the training.
            route: whether a router is trained.
            decode: whether thresholds are calibrated by decoding; otherwise fusion weights only, which is enough
                without a trigger.
            rate: learning rate, or the sweep that finds it; by default the pair's.
            only_if: condition on which it is trained; by default it always is.
            options: further arguments of `s2t train`.
        """
        pair = self.pair
        extra = ("" if route else "-unrouted") + ("" if decode else "-undecoded")
        calibrated_on = "" if calibration.path.name == f"{self.prefix}calibration" else f"-{calibration.path.name}"
        name = f"{labels.path.name}{calibrated_on}{tag_with_rate(options, rate)}{extra}-seed{seed}"
        output = self.folder / "selectors" / name
        command = [recipe("train.py"), "--model", self.model, "--labels", str(labels.path)]
        command += ["--output_dir", str(output), "--seed", str(seed)]
        settings = {"dtype": pair.dtype} | pair.train | options
        needs = [labels, *self.models, *([rate] if isinstance(rate, Sweep) else [])]
        trained = output / "trainer_state.json"
        job = self.add(f"train-{name}", trained, with_rate(command, settings, rate), needs, only_if=only_if)
        if route:
            command = [recipe("train_router.py"), "--adapter", str(output)]
            same = (labels, seed, settings.get("min_prob_ratio"))  # it knows nothing else of the selector beside it
            source = self._taken.setdefault(output, self._routers.get(same))
            if source is not None:
                command += ["--router_of", str(source.path)]
                needs = [job, source]
            else:
                command += ["--model", self.model, "--labels", str(labels.path), "--seed", str(seed)]
                command += as_arguments({"dtype": pair.dtype} | pair.router)
                needs = [job, labels]
            job = self.add(f"router-{name}", output / ROUTER_WEIGHTS_NAME, command, needs, only_if=only_if)
        if decode:
            settings = {"teacher_model": pair.teacher_model}
        elif options.get("proposals") == "adapted":
            settings = {"triggers": ["margin"], "target_rates": [0.1], "check_share": 0, "limit": 20}
        else:
            settings = {"triggers": ["margin"], "target_rates": [0.1], "deployed": False}
        command = [*self._calibrate(calibration, settings), "--adapter", str(output)]
        job = self.add(f"calibrate-{name}", output / CALIBRATION_NAME, command, (job, calibration), output, only_if)
        if route and only_if is None:  # it is trained in any case, so others can take its router
            self._routers.setdefault(same, job)
        return job

    def with_thresholds(self, best: BestTraining, name: str, calibration: Job) -> Job:
        """A copy of the best selector of a sweep, calibrated for triggers too."""
        folder = self.folder / "selectors" / name
        command = self._calibrate(calibration, {"teacher_model": self.pair.teacher_model})
        command += ["--output_dir", str(folder)]
        output, needs = folder / CALIBRATION_NAME, (best, calibration)
        return self.add(f"calibrate-{name}", output, lambda: [*command, "--adapter", str(best.path)], needs, folder)

    def _calibrate(self, calibration: Job, settings: Mapping[str, Any]) -> list[str]:
        """Command of `s2t calibrate`, all but the adapter."""
        shared = {"batch_size": self.pair.batch_size, "dtype": self.pair.dtype} | self.pair.calibrate
        command = [recipe("calibrate.py"), "--model", self.model, "--labels", str(calibration.path)]
        return command + as_arguments(shared | settings)

    def baseline(
        self,
        method: str,
        labels: Job,
        seed: int = 0,
        *,
        rate: float | Sweep,
        only_if: Condition | None = None,
        **options,
    ) -> Job:
        """A LoRA that imitates the teacher.

        Args:
            method: "sft", "kd" or one of SAMPLED.
            labels: labels of the problems to train on; for "kd-sampled" those of sampled texts.
            seed, rate, only_if: see `selector`.
            options: further arguments of `s2t imitate`.
        """
        name = f"{method}-{labels.path.name}{tag_with_rate(options, rate)}-seed{seed}"
        output = self.folder / "baselines" / name
        command = [recipe("train_baseline.py"), "--method", method.removesuffix("-sampled"), "--model", self.model]
        command += ["--teacher_model", self.pair.teacher_model, "--labels", str(labels.path)]
        command += ["--output_dir", str(output), "--seed", str(seed)]
        settings = {"dtype": self.pair.dtype} | self.pair.baseline | options
        if method.startswith("sft"):
            settings["teacher_texts"] = str(self.folder / "teacher_texts")
        if method == "sft-sampled":
            settings["num_samples"] = self.num_rollouts
        needs = [labels, *self.models, *([rate] if isinstance(rate, Sweep) else [])]
        return self.add(f"train-{name}", output, with_rate(command, settings, rate), needs, only_if=only_if)

    def evaluation(
        self,
        name: str,
        *,
        policies: Sequence[str],
        part: str = "test",
        adapters: Sequence[Job | BestTraining] = (),
        tuned: Sequence[tuple[str, Job | BestTraining]] = (),
        needs: Sequence[Job] = (),
        only_if: Condition | None = None,
        **options,
    ) -> Job:
        """A report.json of `s2t eval`.

        Args:
            name, part: name of the output folder, and part of the pair whose problems are answered.
            policies: labels of the policies.
            adapters: selectors, one for each seed.
            tuned: label and training of each imitation. A second-best training that turns out not to be there is left
                out, and its policy with it.
            needs, options: further arguments of `s2t eval`, and further jobs whose output they name.
            only_if: see `selector`.
        """
        data = self.data(part)
        output = self.folder / "evaluations" / f"{self.prefix}{name}"
        command = [recipe("eval.py"), "--model", self.model, "--dataset", str(data.path)]
        command += ["--output_dir", str(output)]
        teacher = any(re.match(r"teacher|takeover|s2t:|.*:kl:", policy) for policy in policies)
        pair, zero_shot = self.pair, any("zero-shot" in policy for policy in policies)
        settings = {"teacher_model": pair.teacher_model if teacher else None}
        settings |= {name: getattr(pair, name) for name in ("max_new_tokens", "batch_size", "dtype")} | self.chat
        settings |= {"zero_shot_text": pair.zero_shot_text if zero_shot else None, "policies": list(policies)}
        settings |= pair.evaluate | options

        def whole_command() -> list[str]:
            absent = {label for label, job in tuned if isinstance(job, BestTraining) and not job.is_there}
            trained = {
                "policies": [policy for policy in policies if policy not in absent],
                "adapters": [str(job.path) for job in adapters] or None,
                "tuned": [f"{label}={job.path}" for label, job in tuned if label not in absent] or None,
            }
            return command + as_arguments(settings | trained)

        trained = [*adapters, *(job for _, job in tuned)]
        is_known = not any(isinstance(job, BestTraining) for job in trained)
        needs = [data, *self.models, *trained, *needs]
        name, output = f"evaluate-{self.prefix}{name}", output / "report.json"
        return self.add(name, output, whole_command() if is_known else whole_command, needs, only_if=only_if)

    def train(self, method: str, labels: Job, seed: int, rate: float | Sweep, *, calibration: Job, **options) -> Job:
        """A selector without thresholds, or a baseline, as sweeps and curves compare them."""
        if method != "s2t-local":
            return self.baseline(method, labels, seed, rate=rate, **options)
        return self.selector(labels, seed, calibration=calibration, decode=False, rate=rate, **options)

    def sweep(
        self,
        method: str,
        labels: Job,
        *,
        calibration: Job,
        seeds: Sequence[int] | None = None,
        rates: Sequence[float] | None = None,
        **options,
    ) -> Sweep:
        """Trains at each learning rate and measures the accuracy on the tuning problems.

        Args:
            method: one of METHODS or SAMPLED.
            labels, calibration, options: see `train`.
            seeds: the first one tries all rates, the others the best or the best two; the pair's by default.
            rates: rates tried in any case; by default those of the pair for this method, or for the method that one
                of SAMPLED varies.
        """
        first_seed, *other_seeds = self.seeds if seeds is None else seeds
        found = self.pair.learning_rates
        rates = rates or found.get(method) or found[method.removesuffix("-sampled")]
        name = f"sweep-{method}-{labels.path.name}{tag(options)}"

        def try_out(rate: float, seed: int, if_trained: Condition | None, if_judged: Condition | None):
            job = self.train(method, labels, seed, rate, calibration=calibration, only_if=if_trained, **options)
            found = {"adapters": [job]} if method == "s2t-local" else {"tuned": [(method, job)]}
            found |= {"policies": [JUDGED_BY[method]], "part": "tuning", "only_if": if_judged}
            return job, self.evaluation(f"{name}-{rate:g}-seed{seed}", **found)

        sweep = Sweep(method, tuple(sorted(rates)), self.pair.further_rates)
        sweep.plan(first_seed, other_seeds, try_out)
        return sweep


def with_rate(command: list[str], settings: Mapping[str, Any], rate: float | Sweep | None):
    """A training's command; a function where a sweep has yet to find the learning rate."""
    if isinstance(rate, Sweep):
        return lambda: command + as_arguments({**settings, "learning_rate": f"{rate.best_rate():g}"})
    return command + as_arguments(settings if rate is None else {**settings, "learning_rate": f"{rate:g}"})


def tag_with_rate(options: Mapping[str, Any], rate: float | Sweep | None) -> str:
    """See `tag`; the learning rate counts as an option."""
    if isinstance(rate, Sweep):
        return f"{tag(options)}-best"
    return tag(options if rate is None else {"learning_rate": f"{rate:g}"} | options)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """`{"lora_r": 4, "policies": ["a", "b"], "x": True}` as a command line: a mapping as JSON, `None` not at all."""
    arguments = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        texts = [json.dumps(item) if isinstance(item, (bool, Mapping)) else str(item) for item in values]
        arguments += [f"--{name}", *texts]
    return arguments


def tag(options: Mapping[str, Any]) -> str:
    """Part of a file's name that lists the options that differ from the usual ones; empty for none."""
    texts = [f"{name}={value}" for name, value in options.items()]
    text = re.sub(r"[^\w.=+-]+", "_", "".join(f"-{text}" for text in texts))
    return text if len(text) < 80 else f"{text[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
