"""From a pair of models to labels, selectors, baselines and evaluations, as jobs: who reads what of whom.

A pair is a YAML of recipes/paper/pairs: two models, their data, and the settings that every method shares. Knows which
recipe makes what and with which arguments; knows nothing of tables, and runs nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from s2t_recipes.commands import recipe
from s2t_recipes.jobs import Job, Jobs
from s2t_recipes.splits import BED_PARTS, PROBLEM_PARTS, is_bed, split_command
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME
from transformers_s2t.files import write_json


METHODS = ("s2t-local", "sft", "kd")
#: The imitations once more, on as many sampled texts of each problem as selectors learn from, in as many steps.
SAMPLED = ("sft-sampled", "kd-sampled")
#: What a sweep is judged by: the policy whose accuracy on the tuning problems counts.
JUDGED_BY = {"s2t-local": "s2t-local:always"} | {method: method for method in (*METHODS[1:], *SAMPLED)}
#: How often a sweep halves, or doubles, the learning rate while the last one is the best.
MAX_FURTHER_RATES = 3
#: A second rate that comes so close to the best one, in points, is trained with the other seeds too.
CLOSE = 0.3


@dataclass
class Pair:
    """Two models, their data and the settings that every method shares.

    Args:
        name: of the YAML file.
        title: for tables.
        model, teacher_model, dataset: Hub ids or local paths; `{data}` and `{models}` in them, and in `part_options`,
            are the folders of `--data` and `--models`.
        sizes: part -> problems.
        part_options: part -> further arguments of a bed's corpus.py.
        label_problems: how many of the part `label`, its first ones, everything trains on; all by default.
        num_seeds: selectors, and trainings of each baseline.
        data_seed: of the division into parts.
        has_answers: whether answers can be checked; where not, only agreement can be measured.
        label, train, router, calibrate, evaluate, baseline: further arguments of the recipes.
        selector_label: further arguments of recipes/label.py for the texts that selectors learn from; without any,
            they learn from the labels that everything else learns from.
        learning_rates: method -> rates tried first on the tuning problems (see `Sweep`).
        further_rates: how often such a sweep goes beyond them, see `MAX_FURTHER_RATES`.
        learning_rates_by_problems: number of label problems -> method -> the same, where the best are other ones.
        system_prompt: with one, prompts go through the tokenizer's chat template.
        chat_template_kwargs: variables of the template; with some, prompts go through it too.
        zero_shot_text: see recipes/eval.py.
        other_text: arguments of recipes/retention.py that name text of another kind; by default the bed's words.
    """

    name: str
    title: str
    model: str
    teacher_model: str
    dataset: str
    sizes: dict[str, int]
    part_options: dict[str, list[str]] = field(default_factory=dict)
    label_problems: int | None = None
    num_seeds: int = 3
    data_seed: int = 0
    has_answers: bool = True
    max_new_tokens: int = 256
    batch_size: int = 64
    dtype: str = "auto"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    label: dict[str, Any] = field(default_factory=dict)
    selector_label: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    further_rates: int = MAX_FURTHER_RATES
    learning_rates_by_problems: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    zero_shot_text: str | None = None
    other_text: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, data: str | None = None, models: str | None = None) -> Pair:
        """Reads a YAML. `like: NAME` in it takes what it does not say from the pair of that name beside it.

        Args:
            file: of the pair.
            data, models: what `{data}` and `{models}` stand for.

        Raises:
            ValueError: for a key that there is not, or one that is missing, or a pair that is like none.
            FileNotFoundError: where the pair wants one of these folders and there is none, or it lacks a file.
        """
        values, names = read_yaml(file), [file.stem]
        while like := values.pop("like", None):  # another pair, but for what this one says
            other = file.with_name(f"{like}.yaml")
            if like in names or not other.is_file():
                raise ValueError(f"{file}: `like` must name another pair beside it, got {like!r}.")
            names.append(like)
            values = read_yaml(other) | values
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{file} has unknown keys {sorted(unknown)}; legal: {[f.name for f in fields(cls)]}.")
        folders = {"data": data, "models": models}

        def fill_in(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: fill_in(one) for key, one in value.items()}
            if isinstance(value, list):
                return [fill_in(one) for one in value]
            for name, folder in folders.items():
                if isinstance(value, str) and f"{{{name}}}" in value:
                    path = Path(value.replace(f"{{{name}}}", folder or ""))
                    if folder is None or not path.exists():
                        raise FileNotFoundError(f"{file} wants {value}: pass its folder as --{name}.")
                    return str(path)
            return value

        values = fill_in(values)
        try:
            pair = cls(name=file.stem, **values)
        except TypeError as error:
            raise ValueError(f"{file}: {error}") from None
        legal = BED_PARTS if is_bed(pair.dataset) else PROBLEM_PARTS
        for name in [*pair.sizes, *pair.part_options]:
            if name not in legal:
                raise ValueError(f"{file}: parts must be among {', '.join(legal)}, got {name!r}.")
        return pair


def read_yaml(file: Path) -> dict[str, Any]:
    with open(file, encoding="utf-8") as text:
        return yaml.safe_load(text)


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
    """What a file's name says of options that differ from the usual ones; empty for none."""
    texts = [f"{name}={value}" for name, value in options.items()]
    text = re.sub(r"[^\w.=+-]+", "_", "".join(f"-{text}" for text in texts))
    return text if len(text) < 80 else f"{text[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def accuracy_of(report: Path, label: str) -> float:
    """Accuracy in per cent of the policy with this label."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return next(row["accuracy"] for row in rows if row["label"] == label)


class Pipeline:
    """The jobs of one pair. Every method returns a job; asked twice for the same, it is the same job.

    Args:
        pair: models, data, settings.
        jobs: where they are added.
        folder: for what they write.
        model: a student other than the pair's, as a job that makes it (a tuned one, for a selector on top of it).
        prefix: of the names of everything that depends on that student.
    """

    def __init__(self, pair: Pair, jobs: Jobs, folder: Path, model: Job | None = None, prefix: str = ""):
        self.pair, self.jobs, self.folder, self.prefix = pair, jobs, folder, prefix
        self.made_model = model
        self.seeds = range(pair.num_seeds)
        self._routers: dict[tuple, Job] = {}  # what a router depends on -> the first adapter that has it
        self._taken: dict[Path, Job | None] = {}  # adapter -> whose router it takes

    def on_top_of(self, adapter: Job | Best, name: str) -> Pipeline:
        """The same pair with another student: this one, with an adapter merged into it."""
        output = self.folder / "merged" / name
        command = [recipe("merge.py"), "--model", self.model, "--output_dir", str(output), "--dtype", self.pair.dtype]
        merged = self.add(
            f"merge-{name}", output, lambda: [*command, "--adapter", str(adapter.path)], [adapter, *self.models]
        )
        return Pipeline(self.pair, self.jobs, self.folder, merged, f"{name}-")

    # models and data

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
        needs: Sequence[Job | Sweep | Best] = (),
        folder: Path | None = None,
        step: Step | None = None,
    ) -> Job:
        """A job of this pair. A command that reads a sweep is a function: which training is best, it tells later."""
        flat = tuple(
            dict.fromkeys(job for need in [*needs, *(step.after if step else ())] for job in jobs_behind(need))
        )
        return self.jobs.add(f"{self.pair.name}-{name}", output, command, flat, folder, step and step.is_taken)

    def data(self, part: str) -> Job:
        """The problems of a part, a .jsonl file."""
        pair, folder = self.pair, self.folder / "data"
        if part not in pair.sizes:
            raise ValueError(f"The pair {pair.name!r} has no part {part!r}: name its size under `sizes`.")
        sizes, options = pair.sizes, ["--only", part, *pair.part_options.get(part, [])]
        command = split_command(recipe("splits.py"), pair.dataset, str(folder), sizes, pair.data_seed, options)
        return self.add(f"data-{part}", folder / f"{part}.jsonl", command)

    # the stages

    def labels(self, part: str, limit: int | None = None, **options) -> Job:
        """Labels of a part, of its first `limit` problems.

        Args:
            part: "label", of which the pair's `label_problems` are taken by default, or another one, which is whole.
            limit: problems.
            options: of recipes/label.py; `adapter` may be a job.
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
        """Texts of each problem that selectors learn from."""
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
        step: Step | None = None,
        **options,
    ) -> Job:
        """An adapter: trained, with a router, calibrated.

        Args:
            labels: to train on.
            seed: of the training.
            calibration: labels to calibrate on.
            route: train a router.
            decode: calibrate thresholds by decoding; otherwise fusion weights only, which is enough without a trigger.
            rate: learning rate, or where to find it.
            step: of a sweep, where it depends on the rates before whether this one is tried.
            options: of recipes/train.py.
        """
        pair = self.pair
        shown = options if isinstance(rate, Sweep) or rate is None else {"learning_rate": f"{rate:g}"} | options
        best = "-best" if isinstance(rate, Sweep) else ""
        extra = ("" if route else "-unrouted") + ("" if decode else "-undecoded")
        calibrated_on = "" if calibration.path.name == f"{self.prefix}calibration" else f"-{calibration.path.name}"
        name = f"{labels.path.name}{calibrated_on}{tag(shown)}{best}{extra}-seed{seed}"
        output = self.folder / "selectors" / name
        command = [recipe("train.py"), "--model", self.model, "--labels", str(labels.path)]
        command += ["--output_dir", str(output), "--seed", str(seed)]
        settings = {"dtype": pair.dtype} | pair.train | options
        needs = [labels, *self.models, *([rate] if isinstance(rate, Sweep) else [])]
        trained = output / "trainer_state.json"
        job = self.add(f"train-{name}", trained, with_rate(command, settings, rate), needs, step=step)
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
            job = self.add(f"router-{name}", output / ROUTER_WEIGHTS_NAME, command, needs, step=step)
        if decode:
            settings = {"teacher_model": pair.teacher_model}
        elif options.get("proposals") == "adapted":
            settings = {"triggers": ["margin"], "target_rates": [0.1], "check_share": 0, "limit": 20}
        else:
            settings = {"triggers": ["margin"], "target_rates": [0.1], "deployed": False}
        command = [*self._calibrate(calibration, settings), "--adapter", str(output)]
        job = self.add(f"calibrate-{name}", output / CALIBRATION_NAME, command, (job, calibration), output, step)
        if route and step is None:  # it is there in any case, for others to take its router
            self._routers.setdefault(same, job)
        return job

    def with_thresholds(self, best: Best, name: str, calibration: Job) -> Job:
        """A copy of the best selector of a sweep, calibrated for triggers too."""
        output = self.folder / "selectors" / name
        command = self._calibrate(calibration, {"teacher_model": self.pair.teacher_model})
        command += ["--output_dir", str(output)]
        return self.add(
            f"calibrate-{name}",
            output / CALIBRATION_NAME,
            lambda: [*command, "--adapter", str(best.path)],
            (best, calibration),
            output,
        )

    def _calibrate(self, calibration: Job, settings: Mapping[str, Any]) -> list[str]:
        """Command of recipes/calibrate.py, all but the adapter."""
        shared = {"batch_size": self.pair.batch_size, "dtype": self.pair.dtype} | self.pair.calibrate
        command = [recipe("calibrate.py"), "--model", self.model, "--labels", str(calibration.path)]
        return command + as_arguments(shared | settings)

    def baseline(
        self, method: str, labels: Job, seed: int = 0, *, rate: float | Sweep, step: Step | None = None, **options
    ) -> Job:
        """A LoRA that imitates: "sft", "kd" or one of SAMPLED.

        `labels`: for "kd-sampled" those of sampled texts. `step`: see `selector`. `options`: of
        recipes/train_baseline.py.
        """
        shown = options if isinstance(rate, Sweep) else {"learning_rate": f"{rate:g}"} | options
        best = "-best" if isinstance(rate, Sweep) else ""
        name = f"{method}-{labels.path.name}{tag(shown)}{best}-seed{seed}"
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
        return self.add(f"train-{name}", output, with_rate(command, settings, rate), needs, step=step)

    def evaluation(
        self,
        name: str,
        *,
        policies: Sequence[str],
        part: str = "test",
        adapters: Sequence[Job | Best] = (),
        tuned: Sequence[tuple[str, Job | Best]] = (),
        needs: Sequence[Job] = (),
        step: Step | None = None,
        **options,
    ) -> Job:
        """A report.json. `step`: see `selector`; `options`: of recipes/eval.py.

        The policy of a training of `tuned` that turns out not to be there, at a second rate, is left out.
        """
        data = self.data(part)
        output = self.folder / "evaluations" / f"{self.prefix}{name}"
        command = [recipe("eval.py"), "--model", self.model, "--dataset", str(data.path)]
        command += ["--output_dir", str(output)]
        teacher = any(re.match(r"teacher|takeover|s2t:|.*:kl:", policy) for policy in policies)
        pair = self.pair
        settings = {
            "teacher_model": self.pair.teacher_model if teacher else None,
            "max_new_tokens": pair.max_new_tokens,
            "batch_size": pair.batch_size,
            "dtype": pair.dtype,
            **self.chat,
            "zero_shot_text": pair.zero_shot_text if any("zero-shot" in policy for policy in policies) else None,
            "policies": list(policies),
        }
        settings |= pair.evaluate | options

        def whole_command() -> list[str]:
            absent = {label for label, job in tuned if isinstance(job, Best) and not job.is_there}
            trained = {
                "policies": [policy for policy in policies if policy not in absent],
                "adapters": [str(job.path) for job in adapters] or None,
                "tuned": [f"{label}={job.path}" for label, job in tuned if label not in absent] or None,
            }
            return command + as_arguments(settings | trained)

        trained = [*adapters, *(job for _, job in tuned)]
        is_known = not any(isinstance(job, Best) for job in trained)
        needs = [data, *self.models, *trained, *needs]
        name, output = f"evaluate-{self.prefix}{name}", output / "report.json"
        return self.add(name, output, whole_command() if is_known else whole_command, needs, step=step)

    # learning rates

    def train(self, method: str, labels: Job, seed: int, rate: float | Sweep, *, calibration: Job, **options) -> Job:
        """A selector without thresholds, or a baseline: what sweeps and curves compare."""
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
            method: of METHODS or SAMPLED.
            labels, calibration, options: of `train`.
            seeds: the first one tries all rates, the others the best or the best two; the pair's by default.
            rates: where to begin; by default those of the pair for this method or, of SAMPLED, for the one it varies.
        """
        first_seed, *other_seeds = self.seeds if seeds is None else seeds
        found = self.pair.learning_rates
        rates = rates or found.get(method) or found[method.removesuffix("-sampled")]
        sweep = Sweep(method, tuple(sorted(rates)), self.pair.further_rates)
        name = f"sweep-{method}-{labels.path.name}{tag(options)}"

        def try_out(rate: float, seed: int, step: Step | None = None, judge: Step | None = None) -> tuple[Job, Job]:
            job = self.train(method, labels, seed, rate, calibration=calibration, step=step, **options)
            found = {"adapters": [job]} if method == "s2t-local" else {"tuned": [(method, job)]}
            found |= {"policies": [JUDGED_BY[method]], "part": "tuning", "step": judge or step}
            return job, self.evaluation(f"{name}-{rate:g}-seed{seed}", **found)

        def try_where_asked(rate: float, before: Sequence[float]) -> None:
            step = Step(tuple(sweep.reports[other] for other in before), partial(sweep.is_tried, rate))
            sweep.trained[rate], sweep.reports[rate] = try_out(rate, first_seed, step)

        for rate in sweep.first:
            sweep.trained[rate], sweep.reports[rate] = try_out(rate, first_seed)
        for rate in sweep.between():
            try_where_asked(rate, sweep.first)
        for outward in sweep.outward():
            for number, rate in enumerate(outward):
                try_where_asked(rate, [*sweep.first, *sweep.between(), *outward[:number]])
        reports = tuple(sweep.reports.values())
        for seed in other_seeds:
            found = {}
            for rate in sweep.trained:
                steps = [Step(reports, partial(told, rate)) for told in (sweep.is_close, sweep.is_judged_again)]
                found[rate] = try_out(rate, seed, *steps)
            sweep.again[seed] = found
        return sweep


@dataclass(frozen=True)
class Step:
    """Jobs of a sweep that are run only where the rates before ask for theirs.

    Attributes:
        after: what tells.
        is_taken: whether they are run; known when `after` is finished.
    """

    after: tuple[Job, ...]
    is_taken: Callable[[], bool]


@dataclass(frozen=True)
class Sweep:
    """Trainings at several learning rates, compared by their accuracy on the tuning problems.

    After the first rates those between them are tried that are half or double of the best. While the best rate is then
    the lowest, half of it is tried too, and while it is the highest, twice as much: at most `further` times.
    All that with one seed. The best rate, and the second best if it is within `CLOSE` points of it, are then trained
    with the other seeds, and the mean over all counts: one seed does not tell a good rate from one at which some
    trainings fail. Of equally good rates the one tried first counts as the best.

    Attributes:
        method: of METHODS or SAMPLED.
        first: the rates tried in any case, from low to high.
        further: how often a rate beyond these is tried, in each direction.
        trained: rate -> the job that trains with it and the first seed; of all rates that might be tried.
        reports: rate -> its evaluation on the tuning problems.
        again: other seed -> rate -> both of these, run where the rate comes close.
    """

    method: str
    first: tuple[float, ...]
    further: int = MAX_FURTHER_RATES
    trained: dict[float, Job] = field(default_factory=dict)
    reports: dict[float, Job] = field(default_factory=dict)
    again: dict[int, dict[float, tuple[Job, Job]]] = field(default_factory=dict)

    def between(self) -> list[float]:
        """Rates between the first ones that might be tried too: half or double of one of them."""
        gaps = zip(self.first, self.first[1:])
        return sorted({rate for low, high in gaps for rate in (2 * low, high / 2) if low < rate < high})

    def outward(self) -> tuple[list[float], list[float]]:
        """Rates that might be tried too: below the first ones and above, from these outwards."""
        powers = [2.0**power for power in range(1, self.further + 1)]
        return [self.first[0] / power for power in powers], [self.first[-1] * power for power in powers]

    def is_tried(self, rate: float) -> bool:
        """Whether the search comes to this rate. Known once the reports of those before are there."""
        if rate in self.first:
            return True
        if self.first[0] < rate < self.first[-1]:
            return self._best_of(self.first) in (rate / 2, 2 * rate)
        outward = next(rates for rates in self.outward() if rate in rates)
        last = self.first[0] if rate < self.first[0] else self.first[-1]
        tried = [*self.first, *filter(self.is_tried, self.between())]
        for following in outward[: outward.index(rate) + 1]:
            if self._best_of(tried) != last:
                return False
            tried.append(following)
            last = following
        return True

    def _best_of(self, rates: Sequence[float]) -> float:
        return max(rates, key=self._accuracy)  # the first of equals

    def _accuracy(self, rate: float) -> float:
        return accuracy_of(self.reports[rate].output, JUDGED_BY[self.method])

    def _close(self) -> list[float]:
        """The best rate by the first seed, and the second best where it comes close to it."""
        best, *others = sorted(filter(self.is_tried, self.trained), key=lambda rate: -self._accuracy(rate))
        return [best, *(rate for rate in others[:1] if round(self._accuracy(best) - self._accuracy(rate), 6) <= CLOSE)]

    def is_close(self, rate: float) -> bool:
        """Whether the other seeds are trained at this rate. Known once the reports of the first one are there."""
        return self.is_tried(rate) and rate in self._close()

    def is_judged_again(self, rate: float) -> bool:
        """Whether these are measured on the tuning problems: not where only one rate is left."""
        return self.is_close(rate) and len(self._close()) > 1

    def best(self, place: int = 0) -> list[Best]:
        """For each seed the training with the best learning rate; place 1: with the second one that comes close."""
        return [Best(self, seed, place) for seed in (None, *self.again)]

    def accuracies(self) -> dict[float, list[float]]:
        """Rate -> accuracies in per cent on the tuning problems, of all seeds with which they were measured.

        Of the rates that were tried, from low to high.
        """
        found = {rate: [self._accuracy(rate)] for rate in sorted(self.trained) if self.is_tried(rate)}
        for rate in filter(self.is_judged_again, found):
            reports = [jobs[rate][1].output for jobs in self.again.values()]
            found[rate] += [accuracy_of(report, JUDGED_BY[self.method]) for report in reports]
        return found

    def ranked(self) -> list[float]:
        """The best rate, and a second one where it comes close. Known once the reports are there."""
        found = self.accuracies()
        return sorted(self._close(), key=lambda rate: -sum(found[rate]) / len(found[rate]))  # equals as they were

    def best_rate(self) -> float:
        """The best rate. Known once the reports are there."""
        return self.ranked()[0]


@dataclass(frozen=True)
class Best:
    """The training of a sweep with the best learning rate, read as a job.

    Attributes:
        sweep: of which it is.
        seed: of the sweep's other ones; `None` for its first.
        place: 0 for the best rate, 1 for a second one that comes close to it, where there is one.
    """

    sweep: Sweep
    seed: int | None = None
    place: int = 0

    @property
    def is_there(self) -> bool:
        """Whether there is a rate in this place. Known once the reports of the sweep are there."""
        return self.place < len(self.sweep.ranked())

    @property
    def path(self) -> Path:
        rate = self.sweep.ranked()[self.place]
        return (self.sweep.trained[rate] if self.seed is None else self.sweep.again[self.seed][rate][0]).path


def jobs_behind(made: Job | Sweep | Best) -> list[Job]:
    """What must have run before its path is known and written."""
    if isinstance(made, Best):
        return jobs_behind(made.sweep)
    if isinstance(made, Sweep):
        again = [job for found in made.again.values() for jobs in found.values() for job in jobs]
        return [*made.trained.values(), *made.reports.values(), *again]
    return [made]


def with_rate(command: list[str], settings: Mapping[str, Any], rate: float | Sweep | None):
    """A training's command; a function where a sweep has yet to find the learning rate."""
    if isinstance(rate, Sweep):
        return lambda: command + as_arguments({**settings, "learning_rate": f"{rate.best_rate():g}"})
    return command + as_arguments(settings if rate is None else {**settings, "learning_rate": f"{rate:g}"})


def note_pair(pair: Pair, folder: Path) -> None:
    """Writes down what a pair's folder was made with."""
    write_json(folder / "pair.json", {f.name: getattr(pair, f.name) for f in fields(pair)})
