"""Runs many recipes, each after those whose output it reads, several side by side, and none twice.

A job is one command, as a user would type it. Where it finished, a stamp says so, and it is not run again; a job whose
command changed, or whose inputs were made anew, is. Output goes into logs, of which the progress of running jobs is
read. Knows nothing of what a recipe does.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from tqdm.auto import tqdm

from s2t_recipes.commands import CommandFailed
from transformers_s2t.files import write_json


#: Imported once, before the first job.
PRELOAD = ("torch", "transformers", "peft", "datasets", "accelerate", "trl.trainer.sft_trainer")
PRELOAD += ("transformers_s2t.training.s2t_trainer", "transformers_s2t.calibration.router_training")
_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")


@dataclass(eq=False)
class Job:
    """One command.

    Args:
        name: name of the job, unique, fit for a file name.
        output: folder or file that it writes last.
        command: path and arguments of a recipe; a function where they depend on what earlier jobs found.
        needs: jobs that must be finished before.
        folder: folder that others read, where that is not `output` itself.
        alone: whether no other job may run beside it, because it measures time.
        only_if: condition that is asked when what it needs is finished. Where it is false the job is not run, and
            what needs the job does not wait for it.
        again: whether it runs whenever it is asked for, finished or not: its recipe looks at more than its command and
            inputs.
    """

    name: str
    output: Path
    command: list[str] | Callable[[], list[str]]
    needs: tuple[Job, ...] = field(default=(), repr=False)  # all that is behind a job would be told many times over
    folder: Path | None = None
    alone: bool = False
    only_if: Callable[[], bool] | None = field(default=None, repr=False)
    again: bool = False

    @property
    def path(self) -> Path:
        """What others read."""
        return self.output if self.folder is None else self.folder

    def arguments(self) -> list[str]:
        return self.command() if callable(self.command) else self.command


class JobFailed(CommandFailed):
    """A command ended with an error: its message holds the command and the end of its log, `status` how it exited."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class OwnProcess(subprocess.Popen):
    """A command in a Python of its own, with the names of a forked process."""

    join = subprocess.Popen.wait

    @property
    def exitcode(self) -> int | None:
        return self.poll()


@dataclass
class Jobs:
    """The jobs of a run.

    Args:
        folder: folder for stamps and logs.
        num_parallel: number of jobs side by side.
        env: environment variables of the jobs' processes, beside those of this one.
        forks: whether processes are forked from one that has imported the libraries already, with `env` as it was in
            the first run: with hundreds of short jobs the imports would cost more than the work. Otherwise each job is
            started as a user would, and may have the terminal.
        keep: whether what a job wrote with another command or other inputs is left to its recipe, which resumes it or
            skips what is finished. Otherwise it is removed before the job runs again.
    """

    folder: Path
    num_parallel: int = 1
    env: dict[str, str] = field(default_factory=dict)
    all: dict[str, Job] = field(default_factory=dict)
    forks: bool = True
    keep: bool = False

    def add(
        self,
        name: str,
        output: Path,
        command: list[str] | Callable[[], list[str]],
        needs: tuple[Job, ...] = (),
        folder: Path | None = None,
        only_if: Callable[[], bool] | None = None,
    ) -> Job:
        """The job of that name; asked for twice it is one job.

        Raises:
            ValueError: where another job has the name: another command, or one that is known later and reads others.
        """
        if name in self.all:
            job = self.all[name]
            same = callable(job.command) if callable(command) else job.command == command
            if not same or set(job.needs) != set(needs) or (job.output, job.folder) != (output, folder):
                told = ["a command that is known later" if callable(c) else typed(c) for c in (job.command, command)]
                raise ValueError(f"Two jobs are named {name!r}: {told[0]} and {told[1]}.")
            return job
        self.all[name] = Job(name, output, command, needs, folder, only_if=only_if)
        return self.all[name]

    def is_done(self, job: Job) -> bool:
        """Whether the job is finished and nothing that it reads has changed since; or it is not to be run."""
        return job not in self.missing([job])

    def missing(self, asked: Iterable[Job] | None = None) -> list[Job]:
        """The jobs among `asked` (by default all) that are not done, and those that may yet turn out not to be run."""
        done: dict[Job, bool] = {}

        def look(job: Job) -> bool:
            if job not in done:
                done[job] = all(look(need) for need in job.needs) and (self._is_left_out(job) or self._is_stamped(job))
            return done[job]

        return [job for job in (self.all.values() if asked is None else asked) if not look(job)]

    def _is_stamped(self, job: Job) -> bool:
        """Whether the job, all of whose inputs are finished, is so too."""
        stamp = self._read_stamp(job)
        return (
            stamp is not None
            and not job.again
            and job.output.exists()
            and stamp["command"] == typed(job.arguments())
            and stamp["inputs"] == self._inputs(job)
        )

    def _is_left_out(self, job: Job) -> bool:
        return job.only_if is not None and not job.only_if()

    def _inputs(self, job: Job) -> dict[str, float | None]:
        """When each of its inputs was finished; `None` for one that was not to be run."""
        return {
            need.name: None if self._is_left_out(need) else self._read_stamp(need)["finished"] for need in job.needs
        }

    def run(self, asked: Iterable[Job] | None = None, on_terminal: bool = False, stop: bool = False) -> None:
        """Runs what is missing. Of the jobs that can start, the one with the longest chain of jobs behind it is first:
        left for the end, such a chain would keep a single process busy.

        Args:
            asked: run only these (default: all), each behind what it needs; what they need beside is finished.
            on_terminal: print each command and leave the terminal to it, without a log; for jobs one after the other.
            stop: at the first failure, ending what runs beside; otherwise all that does not read it is run.

        Raises:
            JobFailed: where a command failed; at the end, unless `stop`.
            ValueError: for `on_terminal` with `forks`.
        """
        todo = self.missing(asked)
        chain = chains_behind(todo)
        waiting, running = sorted(todo, key=lambda job: -chain[job]), {}
        failures, behind_failures = [], set()
        if not todo:
            return
        if on_terminal and self.forks:
            raise ValueError("`on_terminal` must be False for jobs that are forked, got True: these only have logs.")
        if self.forks:
            os.environ.update(self.env)  # of the process that all are forked from, so before it starts
            multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
        with progress_bar(len(todo), disable=on_terminal) as bar:
            shares: dict[Job, float] = {}
            try:
                while waiting or running:
                    dropped = [job for job in waiting if behind_failures.intersection(job.needs)]
                    if dropped:
                        behind_failures.update(dropped)
                        waiting = [job for job in waiting if job not in behind_failures]
                        continue  # until nothing is left that reads what there is not
                    pending = {*waiting, *running}
                    ready = [job for job in waiting if not pending.intersection(job.needs)]
                    left_out = [job for job in ready if self._is_left_out(job)]
                    if left_out:
                        waiting = [job for job in waiting if job not in left_out]
                        bar.total -= len(left_out)
                        continue  # others may have waited for these
                    for job in ready:
                        if len(running) == self.num_parallel or any(other.alone for other in running):
                            break
                        if job.alone and running:
                            continue
                        waiting.remove(job)
                        running[job] = (self._start(job, on_terminal), time.monotonic())
                    if self.forks:
                        wait([process.sentinel for process, _ in running.values()], timeout=0.5)
                    else:
                        time.sleep(0.1)
                    for job, (process, began) in list(running.items()):
                        if process.exitcode is None:
                            shares[job] = max(shares.get(job, 0.0), 0.99 * read_progress(self.log_of(job)))
                            continue
                        del running[job]
                        shares[job] = 1.0
                        try:
                            self._finish(job, process.exitcode, time.monotonic() - began)
                        except JobFailed as error:
                            if stop:
                                raise
                            behind_failures.add(job)
                            failures.append(str(error))
                            bar.write(f"{job.name} failed" + (f", see {self.log_of(job)}" if not on_terminal else ""))
                    beside = ", ".join(f"{job.name} {shares[job]:.0%}" for job in running)
                    bar.set_postfix_str(beside, refresh=False)
                    bar.update(sum(shares.values()) - bar.n)
            finally:
                for process, _ in running.values():
                    process.terminate()
                    process.join()

        if failures:
            rest = len(behind_failures) - len(failures)
            raise JobFailed("\n\n".join([*failures, f"{len(failures)} failed, {rest} that read them were not run."]))

    def seconds(self, job: Job) -> float:
        """What the job took when it ran; 0 if it was not to be run."""
        return 0.0 if self._is_left_out(job) else self._read_stamp(job)["seconds"]

    def log_of(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.name}.log"

    def _stamp_of(self, job: Job) -> Path:
        return self.folder / "done" / f"{job.name}.json"

    def _read_stamp(self, job: Job) -> dict | None:
        file = self._stamp_of(job)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _start(self, job: Job, on_terminal: bool) -> multiprocessing.process.BaseProcess | OwnProcess:
        if self._stamp_of(job).is_file():  # what is there was made in another way: nothing of it may be taken for new
            if not self.keep:
                remove(job.output)
            self._stamp_of(job).unlink()
        command, log = job.arguments(), self.log_of(job)
        if on_terminal:
            log.unlink(missing_ok=True)
            print(f"$ {typed(command)}", flush=True)
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"$ {typed(command)}\n", encoding="utf-8")
        if self.forks:
            process = multiprocessing.get_context("forkserver").Process(target=run_command, args=(command, str(log)))
            process.start()
            return process
        with nullcontext() if on_terminal else open(log, "ab") as output:
            return OwnProcess([sys.executable, *command], env=os.environ | self.env, stdout=output, stderr=output)

    def _finish(self, job: Job, code: int, seconds: float) -> None:
        if code or not job.output.exists():
            why = f"exit status {code}" if code else f"it wrote no {job.output}"
            message, log = f"Failed ({why}): {typed(job.arguments())}", self.log_of(job)
            if log.is_file():  # else its output was on the terminal
                message = f"{log.read_bytes().decode(errors='replace')[-3000:]}\n\n{message}\nLog: {log}"
            raise JobFailed(message, status=max(code, 1))
        stamp = {
            "command": typed(job.arguments()),
            "inputs": self._inputs(job),
            "finished": time.time(),
            "seconds": round(seconds, 3),
        }
        write_json(self._stamp_of(job), stamp)


def chains_behind(jobs: list[Job]) -> dict[Job, int]:
    """Length of the longest chain of jobs that wait for each job. `jobs`: each after what it needs."""
    length = dict.fromkeys(jobs, 0)
    for job in reversed(jobs):
        for need in job.needs:
            if need in length:
                length[need] = max(length[need], length[job] + 1)
    return length


def progress_bar(total: int, disable: bool) -> tqdm:
    """One for jobs, of which parts are done; in a file it is written every five seconds."""
    layout = "{percentage:3.0f}%|{bar:30}| {n:.1f}/{total} jobs [{elapsed}<{remaining}{postfix}]"
    interval = 0.5 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, bar_format=layout, smoothing=0, mininterval=interval, miniters=0, disable=disable)


def read_progress(log: Path) -> float:
    """Share of the longest progress bar in a log, 0 where there is none."""
    longest, share = 0, 0.0
    for match in _PROGRESS.finditer(log.read_bytes() if log.is_file() else b""):
        current, total = int(match[1]), int(match[2])
        if total >= longest and total > 0:
            longest, share = total, current / total
    return min(share, 1.0)


def run_command(command: list[str], log: str) -> None:
    """Runs a recipe in this process as `python` would, with its output appended to a file."""
    import runpy

    gc.freeze()  # what was imported before the fork stays: no collection has to look through it
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def remove(path: Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def typed(command: list[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["python", *command])
