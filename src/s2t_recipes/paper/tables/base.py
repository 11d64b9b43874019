"""The labels, selectors and imitations of a pair that several tables read."""

from __future__ import annotations

from dataclasses import dataclass

from s2t_recipes.jobs import Job
from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.sweep import SAMPLED, BestTraining, Sweep


@dataclass
class Base:
    """The labels and calibrated selectors that several tables read, trained at the pair's best learning rate.

    Attributes:
        pipeline: the pipeline of the pair.
        labels: labels that imitations learn from.
        selector_labels: labels of the same problems that selectors learn from.
        calibration: labels to calibrate on.
        sweep: sweep over the selectors' learning rate; `None` where answers cannot be checked, or there is one rate.
        adapters: the selectors, one for each seed.
    """

    pipeline: Pipeline
    labels: Job
    selector_labels: Job
    calibration: Job
    sweep: Sweep | None
    adapters: list[Job | BestTraining]

    @classmethod
    def of(cls, pipeline: Pipeline, thresholds: bool = True, route: bool = True) -> Base:
        """Plans them.

        Args:
            pipeline: the pipeline of the pair.
            thresholds: calibrate for triggers too, which decodes; otherwise for the fused score only.
            route: train routers.
        """
        labels, calibration = pipeline.selector_labels(), pipeline.labels("calibration")
        base = cls(pipeline, pipeline.labels("label"), labels, calibration, None, [])
        if pipeline.pair.has_answers and len(pipeline.pair.learning_rates.get("s2t-local", ())) > 1:
            more = {} if route else {"route": False}
            base.sweep = pipeline.sweep("s2t-local", labels, calibration=calibration, **more)
        if base.sweep is None:
            settings = {"calibration": calibration, "decode": thresholds, "route": route}
            base.adapters = [pipeline.selector(labels, seed, **settings) for seed in pipeline.seeds]
            return base
        base.adapters = base.sweep.best()
        if thresholds:
            base.adapters = [
                pipeline.with_thresholds(best, f"{labels.path.name}-best-seed{seed}", calibration)
                for seed, best in zip(pipeline.seeds, base.adapters)
            ]
        return base

    def imitation(self, method: str) -> Sweep:
        """The sweep of "sft", "kd" or one of SAMPLED, on the same problems and with as many steps."""
        labels, settings = self.labels, {"calibration": self.calibration}
        if method in SAMPLED:
            labels = self.selector_labels if method == "kd-sampled" else self.labels
            epochs = self.pipeline.pair.baseline["num_train_epochs"] / self.pipeline.num_rollouts
            settings["num_train_epochs"] = f"{epochs:g}"
        return self.pipeline.sweep(method, labels, **settings)
