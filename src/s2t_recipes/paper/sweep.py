"""Learning-rate sweeps: which rates are tried, with which seeds, and which of them is the best.

Reads the accuracy on the tuning problems from reports of `s2t eval`. Knows no recipes: the caller plans the jobs
of one rate and one seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from s2t_recipes.jobs import Job


METHODS = ("s2t-local", "sft", "kd")
#: The imitations once more, on as many sampled texts of each problem as selectors learn from, in as many steps.
SAMPLED = ("sft-sampled", "kd-sampled")
#: Method -> the policy whose accuracy on the tuning problems a sweep compares.
JUDGED_BY = {"s2t-local": "s2t-local:always"} | {method: method for method in (*METHODS[1:], *SAMPLED)}
#: A second rate that comes so close to the best one, in points, is trained with the other seeds too.
CLOSE = 0.3


@dataclass(frozen=True)
class Condition:
    """Whether a job is run at all, which the reports of other jobs tell.

    Attributes:
        known_after: jobs that must be finished, or left out, before `holds` can be asked.
        holds: whether the job is run.
    """

    known_after: tuple[Job, ...]
    holds: Callable[[], bool]


#: Plans one training and its evaluation on the tuning problems: rate, seed, conditions of the two -> both jobs.
TryOut = Callable[[float, int, Condition | None, Condition | None], tuple[Job, Job]]


@dataclass(frozen=True)
class Sweep:
    """Trainings at several learning rates, compared by their accuracy on the tuning problems.

    After the first rates those between them are tried that are half or double of the best. While the best rate is then
    the lowest, half of it is tried too, and while it is the highest, twice as much: at most `further` times.
    All that with one seed. The best rate, and the second best if it is within `CLOSE` points of it, are then trained
    with the other seeds, and the mean over all counts: one seed does not tell a good rate from one at which some
    trainings fail. Of equally good rates the one tried first counts as the best.

    Attributes:
        method: one of METHODS or SAMPLED.
        first: the rates tried in any case, from low to high.
        further: how often a rate beyond these is tried, in each direction.
        trained: rate -> the job that trains with it and the first seed, for all rates that might be tried.
        reports: rate -> its evaluation on the tuning problems.
        again: other seed -> rate -> both of these, run where the rate comes close.
    """

    method: str
    first: tuple[float, ...]
    further: int
    trained: dict[float, Job] = field(default_factory=dict)
    reports: dict[float, Job] = field(default_factory=dict)
    again: dict[int, dict[float, tuple[Job, Job]]] = field(default_factory=dict)

    def plan(self, first_seed: int, other_seeds: Sequence[int], try_out: TryOut) -> None:
        """Adds the jobs of all rates that might be tried; those that depend on reports have a [`Condition`]."""
        for rate in self.first:
            self.trained[rate], self.reports[rate] = try_out(rate, first_seed, None, None)
        lower, higher = self.outward()
        earlier = dict.fromkeys(self.between(), self.first)  # rate -> those whose reports tell whether it is tried
        for outward in (lower, higher):
            for number, rate in enumerate(outward):
                earlier[rate] = (*self.first, *self.between(), *outward[:number])
        for rate, before in earlier.items():
            condition = Condition(tuple(self.reports[other] for other in before), partial(self.is_tried, rate))
            self.trained[rate], self.reports[rate] = try_out(rate, first_seed, condition, condition)
        reports = tuple(self.reports.values())
        for seed in other_seeds:
            self.again[seed] = {
                rate: try_out(
                    rate,
                    seed,
                    Condition(reports, partial(self.is_close, rate)),
                    Condition(reports, partial(self.is_judged_again, rate)),
                )
                for rate in self.trained
            }

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
        best = self._best_of(self.first)
        if self.first[0] < rate < self.first[-1]:
            return best in (rate / 2, 2 * rate)
        outward = next(rates for rates in self.outward() if rate in rates)
        last = self.first[0] if rate < self.first[0] else self.first[-1]
        tried = [*self.first, *(other for other in self.between() if best in (other / 2, 2 * other))]
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
        return rate in self._close()

    def is_judged_again(self, rate: float) -> bool:
        """Whether these are measured on the tuning problems: not where only one rate is left."""
        close = self._close()
        return rate in close and len(close) > 1

    def accuracies(self) -> dict[float, list[float]]:
        """Rate -> accuracies in per cent on the tuning problems, one for each seed with which it was measured.

        Holds the rates that were tried, from low to high.
        """
        found = {rate: [self._accuracy(rate)] for rate in sorted(self.trained) if self.is_tried(rate)}
        close = self._close()
        for rate in close if len(close) > 1 else ():
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

    def best(self, place: int = 0) -> list[BestTraining]:
        """For each seed the training with the best learning rate; place 1: with the second one that comes close."""
        return [BestTraining(self, seed, place) for seed in (None, *self.again)]


@dataclass(frozen=True)
class BestTraining:
    """The training of a sweep with the best learning rate; like a job it has a path.

    Attributes:
        sweep: the sweep whose reports tell which training it is.
        seed: one of the sweep's other seeds; `None` for its first.
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


def jobs_behind(made: Job | Sweep | BestTraining) -> list[Job]:
    """The jobs that must have run before its path is known and written."""
    if isinstance(made, BestTraining):
        return jobs_behind(made.sweep)
    if isinstance(made, Sweep):
        again = [job for found in made.again.values() for jobs in found.values() for job in jobs]
        return [*made.trained.values(), *made.reports.values(), *again]
    return [made]


def accuracy_of(report: Path, label: str) -> float:
    """Accuracy in per cent of the policy with this label. A report is read once, and again where it was rewritten."""
    status = report.stat()
    return read_accuracies(report, status.st_ino, status.st_mtime_ns, status.st_size)[label]


@cache
def read_accuracies(report: Path, *version: int) -> dict[str, float]:
    """Label -> accuracy in per cent. `version`: numbers that change when the file does, part of what is remembered."""
    return {row["label"]: row["accuracy"] for row in json.loads(report.read_text(encoding="utf-8"))["rows"]}
