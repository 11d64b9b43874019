"""The jobs behind the tables of docs/results, and the tables: what runs when, what is made again, what is printed."""

import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import corpus
import pytest
import yaml

from s2t_recipes import jobs as jobs_module
from s2t_recipes import splits
from s2t_recipes.evaluation import agreement, retention
from s2t_recipes.evaluation import run as evaluation
from s2t_recipes.labeling import label
from s2t_recipes.paper import pair as pair_module
from s2t_recipes.paper import pipeline as pipeline_module
from s2t_recipes.paper import results
from s2t_recipes.paper import run as paper
from s2t_recipes.paper import sweep as sweep_module
from s2t_recipes.training import calibrate, imitate, merge, router, train
from transformers_s2t import SelectorConfig
from transformers_s2t.files import write_json


ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PRELOAD = jobs_module.PRELOAD
Jobs, Pair, Pipeline, Sweep = jobs_module.Jobs, pair_module.Pair, pipeline_module.Pipeline, sweep_module.Sweep


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Paths of the recipes are relative to the repository; no more is imported before a job than what runs it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs_module, "PRELOAD", ("transformers_s2t.config", "tqdm.auto", "pytest"))


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


SCRIPT = """
import sys
from pathlib import Path
output, *inputs = sys.argv[1:]
if "fail" in inputs:
    print("no good")
    sys.exit(3)
Path(output).write_text(output[-1] + "".join(Path(file).read_text() for file in inputs if "/" in file))
with open(Path(output).parent / "order", "a") as order:
    order.write(output[-1])
"""


@pytest.fixture
def make(tmp_path):
    """Adds a job of a script that joins its inputs and notes the order in which it ran."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def add(jobs, name, *needs, more=()):
        command = [str(script), str(tmp_path / name), *(str(need.path) for need in needs), *more]
        return jobs.add(name, tmp_path / name, command, needs)

    return add


@pytest.mark.parametrize("name", PRELOAD)
def test_what_is_imported_before_the_jobs_is_there(name):
    """A name that there is not would be passed over in silence, and every job would import for itself."""
    assert importlib.util.find_spec(name) is not None


def test_jobs_run_after_what_they_read_and_once(tmp_path, make):
    jobs = Jobs(tmp_path, 2)
    a, b = make(jobs, "a"), make(jobs, "b")
    c = make(jobs, "c", a, b)
    assert make(jobs, "a") is a
    make(jobs, "d", c)
    jobs.run()
    assert (tmp_path / "d").read_text() == "dcab"
    assert (tmp_path / "order").read_text() in ("abcd", "bacd")
    jobs.run()  # nothing is left to do
    assert len((tmp_path / "order").read_text()) == 4
    assert jobs.seconds(a) > 0


def test_the_job_with_the_longest_chain_behind_it_is_next(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    make(jobs, "x"), make(jobs, "y")
    a = make(jobs, "a")
    make(jobs, "c", make(jobs, "b", a))
    make(jobs, "d", a)
    jobs.run()
    assert (tmp_path / "order").read_text() == "abxycd"  # of equals the one that was added first


def test_a_changed_command_is_run_again_with_all_that_reads_it(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    make(jobs, "b", make(jobs, "a"))
    make(jobs, "c")
    jobs.run()
    again = Jobs(tmp_path, 1)
    make(again, "b", make(again, "a", more=["other"]))
    make(again, "c")
    assert [job.name for job in again.all.values() if not again.is_done(job)] == ["a", "b"]
    again.run()
    assert (tmp_path / "order").read_text() == "abcab"
    (tmp_path / "c").unlink()  # what it wrote is gone
    assert not again.is_done(again.all["c"])


def test_a_failed_job_tells_its_command_and_the_end_of_its_output(tmp_path, make):
    jobs = Jobs(tmp_path, 2)
    bad = make(jobs, "a", more=["fail"])
    make(jobs, "b", bad)
    with pytest.raises(jobs_module.JobFailed, match=r"no good\n\n+Failed \(exit status 3\): python .*script.py"):
        jobs.run()
    assert not (tmp_path / "order").exists()
    with pytest.raises(ValueError, match="Two jobs are named 'a'"):
        make(jobs, "a")


def test_two_jobs_of_one_name_are_refused_though_their_commands_are_not_known_yet(tmp_path, make):
    jobs = Jobs(tmp_path)
    a, b = make(jobs, "a"), make(jobs, "b")
    found = jobs.add("x", tmp_path / "x", lambda: ["x.py"], (a, b))
    assert jobs.add("x", tmp_path / "x", lambda: ["x.py"], (a, b)) is found
    for output, command, needs in [
        (tmp_path / "x", lambda: ["x.py"], (a,)),  # it chooses among others
        (tmp_path / "y", lambda: ["x.py"], (a, b)),
        (tmp_path / "x", ["x.py"], (a, b)),
    ]:
        with pytest.raises(ValueError, match="Two jobs are named 'x': a command that is known later and "):
            jobs.add("x", output, command, needs)
    with pytest.raises(ValueError, match="Two jobs are named 'a': .* and a command that is known later"):
        jobs.add("a", tmp_path / "a", lambda: a.command)


def test_what_does_not_read_a_failed_job_is_run(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    bad = make(jobs, "a", more=["fail"])
    behind = make(jobs, "c", make(jobs, "b", bad))
    make(jobs, "e", make(jobs, "d"))
    with pytest.raises(jobs_module.JobFailed, match="1 failed, 2 that read them were not run"):
        jobs.run()
    assert (tmp_path / "order").read_text() == "de"
    assert not jobs.is_done(behind) and [job.name for job in jobs.all.values() if jobs.is_done(job)] == ["d", "e"]


def test_a_command_may_wait_for_what_earlier_jobs_found(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    a = make(jobs, "a")
    script = str(tmp_path / "script.py")
    jobs.add("b", tmp_path / "b", lambda: [script, str(tmp_path / "b"), str(tmp_path / a.path.read_text())], (a,))
    jobs.run()
    assert (tmp_path / "b").read_text() == "ba"


def test_a_job_that_is_not_wanted_is_left_out_and_nobody_waits_for_it(tmp_path, make):
    """Whether it is wanted is asked when what tells is finished; what reads it runs again when that changes."""
    answer = tmp_path / "answer"

    def plan():
        jobs = Jobs(tmp_path, 2)
        a = make(jobs, "a")
        b = make(jobs, "b", a)
        b.only_if = lambda: a.output.exists() and answer.exists()
        c = jobs.add("c", tmp_path / "c", [str(tmp_path / "script.py"), str(tmp_path / "c")], (a, b))
        return jobs, a, b, c

    jobs, a, b, c = plan()
    assert [job.name for job in jobs.missing()] == ["a", "b", "c"]
    for _ in range(2):  # the second time nothing is left to do
        jobs.run()
        assert (tmp_path / "order").read_text() == "ac" and not jobs.missing() and jobs.is_done(b)
    assert not b.output.exists() and jobs.seconds(b) == 0 < jobs.seconds(c)
    answer.touch()
    jobs, a, b, c = plan()
    assert jobs.missing() == [b, c]
    jobs.run()
    assert (tmp_path / "order").read_text() == "acbc" and jobs.seconds(b) > 0
    answer.unlink()
    jobs, a, b, c = plan()
    assert jobs.missing() == [c]  # it was made from one that no longer counts
    jobs.run()
    assert (tmp_path / "order").read_text() == "acbcc" and not jobs.missing()


def test_a_job_behind_a_failed_one_is_not_asked_whether_it_is_wanted(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    bad = make(jobs, "a", more=["fail"])
    make(jobs, "b", bad).only_if = lambda: bad.output.read_text() == "a"
    with pytest.raises(jobs_module.JobFailed, match="1 failed, 1 that read them were not run"):
        jobs.run()


def test_what_ended_half_way_is_not_done(tmp_path, make):
    jobs = Jobs(tmp_path, 1)
    job = make(jobs, "a")
    (tmp_path / "a").write_text("half")  # an output without a stamp: the recipe itself knows how to go on
    assert not jobs.is_done(job)
    jobs.run()
    assert (tmp_path / "a").read_text() == "a"


def add_script(jobs, folder, name, text, needs=()):
    """A job of a script of its own, which finds its output in `output`."""
    script = folder / f"{name}.py"
    script.write_text(f"import os, sys, time\nfrom pathlib import Path\noutput = Path(sys.argv[1])\n{text}")
    return jobs.add(name, folder / f"{name}.out", [str(script), str(folder / f"{name}.out")], needs)


MEET = """
began = time.monotonic()
output.with_suffix(".here").touch()
while not all(output.with_name(other + ".here").exists() for other in {others}):
    if time.monotonic() > began + 30:
        sys.exit("nobody came")
    time.sleep(0.01)
time.sleep(0.1)
output.write_text(f"{{began}} {{time.monotonic()}}")
"""


@pytest.mark.parametrize("order", ["abz", "zab", "azb"])
def test_two_jobs_run_side_by_side_but_one_that_measures_time_alone(tmp_path, order):
    jobs = Jobs(tmp_path, 3)
    for name in order:
        others = {"a": ["b"], "b": ["a"], "z": []}[name]  # a and b end only where both run at once
        add_script(jobs, tmp_path, name, MEET.format(others=others)).alone = name == "z"
    jobs.run()
    times = {name: tuple(map(float, jobs.all[name].output.read_text().split())) for name in order}
    for name in "ab":
        assert times[name][1] < times["z"][0] or times["z"][1] < times[name][0], times


def test_no_more_jobs_run_than_were_asked_for(tmp_path):
    jobs = Jobs(tmp_path, 2)
    for name in "abc":
        add_script(jobs, tmp_path, name, MEET.format(others=[]))
    jobs.run()
    times = [tuple(map(float, job.output.read_text().split())) for job in jobs.all.values()]
    assert max(sum(began <= other[0] <= ended for other in times) for began, ended in times) <= 2


def test_what_is_stopped_leaves_no_stamp_and_runs_again(tmp_path, monkeypatch):
    def interrupt(self, job, code, seconds):
        raise KeyboardInterrupt

    jobs = Jobs(tmp_path, 2)
    slow = add_script(jobs, tmp_path, "slow", "output.write_text(str(os.getpid()))\ntime.sleep(60)")
    waiting = f"other = Path({str(slow.output)!r})\nwhile not other.exists() or not other.read_text():\n"
    bad = add_script(jobs, tmp_path, "bad", waiting + "    time.sleep(0.01)\nraise OSError('bad luck')")
    add_script(jobs, tmp_path, "after", "output.touch()", (slow,))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Jobs, "_finish", interrupt)  # while the other one runs
        jobs.run()
    pid = int(slow.output.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # it is not left behind
    assert not (tmp_path / "done").exists() and not jobs.is_done(slow)
    for job in (slow, bad):
        Path(job.command[0]).write_text("import sys\nopen(sys.argv[1], 'a').write('!')")
    jobs.run()
    assert slow.output.read_text() == f"{pid}!"  # without a stamp, what was there is the recipe's to judge
    assert all(map(jobs.is_done, jobs.all.values()))


def test_a_stale_output_is_removed_before_its_command_runs_again(tmp_path):
    """A recipe that finds its output finished would keep it."""
    text = "if output.exists():\n    sys.exit(0)\noutput.mkdir()\n(output / sys.argv[2]).touch()\n"
    text += "if sys.argv[2] == 'bad':\n    sys.exit(5)"
    jobs = Jobs(tmp_path)
    job = add_script(jobs, tmp_path, "a", text)
    for setting in ("one", "two", "bad", "one"):
        job.command = [*job.command[:2], setting]
        if setting == "bad":
            with pytest.raises(jobs_module.JobFailed, match="exit status 5"):
                jobs.run()
            assert not jobs.is_done(job)
            job.command[2] = "two"  # it was finished once, but is no longer
            assert not jobs.is_done(job)
            jobs_module.remove(job.output)
            continue
        jobs.run()
        assert [file.name for file in job.output.iterdir()] == [setting] and jobs.is_done(job)


def test_what_is_made_again_is_made_again_downstream(tmp_path, make):
    """Also where the command in between is the same, and where only the stamp tells that an input is new."""
    jobs = Jobs(tmp_path, 2)
    a = make(jobs, "a")
    b = make(jobs, "b", a)
    make(jobs, "c", b)
    jobs.run()
    (tmp_path / "a").unlink()
    assert not any(map(jobs.is_done, jobs.all.values()))
    Jobs(tmp_path, 1, all={"a": a}).run()  # a alone, by another table
    assert jobs.is_done(a) and not jobs.is_done(b)
    jobs.run()
    assert (tmp_path / "order").read_text() == "abcabc"


def test_a_command_that_writes_nothing_or_cannot_be_told_has_failed(tmp_path):
    jobs = Jobs(tmp_path)
    add_script(jobs, tmp_path, "a", "print('done')")
    with pytest.raises(jobs_module.JobFailed, match=r"done\n\n\nFailed \(it wrote no .*a.out\)"):
        jobs.run()
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("forks", [True, False])
def test_only_what_was_asked_for_runs_and_the_first_failure_may_end_it(tmp_path, make, forks):
    jobs = Jobs(tmp_path, 1, forks=forks)
    a, b = make(jobs, "a"), make(jobs, "b", more=["fail"])
    c = make(jobs, "c")
    jobs.run([a])
    assert (tmp_path / "order").read_text() == "a"
    with pytest.raises(jobs_module.JobFailed, match="exit status 3") as error:
        jobs.run([b, c], stop=True)
    assert error.value.status == 3 and (tmp_path / "order").read_text() == "a"
    with pytest.raises(jobs_module.JobFailed, match="1 failed, 0 that read them") as error:
        jobs.run()
    assert error.value.status == 1 and (tmp_path / "order").read_text() == "ac"


def test_environment_variables_of_jobs_are_theirs_alone(tmp_path):
    before = dict(os.environ)
    jobs = Jobs(tmp_path, env={"S2T_TEST": "x"}, forks=False)
    job = add_script(jobs, tmp_path, "a", "output.write_text(os.environ['S2T_TEST'])")
    jobs.run()
    assert job.output.read_text() == "x" and dict(os.environ) == before


def test_output_on_the_terminal_leaves_no_log(tmp_path, capfd):
    jobs = Jobs(tmp_path, forks=False)
    job = add_script(jobs, tmp_path, "a", "print('here')\nsys.exit(4)")
    with pytest.raises(jobs_module.JobFailed, match=r"^Failed \(exit status 4\): python .*a.out$"):
        jobs.run(on_terminal=True, stop=True)
    out, err = capfd.readouterr()
    assert out.startswith("$ python ") and out.endswith("a.out\nhere\n") and "jobs [" not in err
    assert not jobs.log_of(job).exists()
    with pytest.raises(ValueError, match="`on_terminal` must be False for jobs that are forked"):
        Jobs(tmp_path, all=jobs.all).run(on_terminal=True)


def test_what_is_kept_is_for_its_recipe_to_judge(tmp_path, make):
    jobs = Jobs(tmp_path, keep=True)
    text = "output.write_text((output.read_text() if output.exists() else '') + sys.argv[2])"
    job = add_script(jobs, tmp_path, "a", text)
    for setting in "xyy":
        job.command = [*job.command[:2], setting]
        jobs.run()
    assert job.output.read_text() == "xy"
    job.again = True
    jobs.run()
    assert job.output.read_text() == "xyy" and not jobs.is_done(job)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and pipelines


def pair_of(**more) -> Pair:
    sizes = {"label": 100, "tuning": 10, "calibration": 20, "test": 30}
    return Pair("p", "P", "M", "T", "recipes/embedded", **({"sizes": sizes} | more))


def test_command_lines_of_options(tmp_path):
    assert pipeline_module.as_arguments({"a": 1, "b": True, "c": None, "d": ["x", 2.5], "e": "no"}) == (
        ["--a", "1", "--b", "true", "--d", "x", "2.5", "--e", "no"]
    )
    assert pipeline_module.as_arguments({"chat_template_kwargs": {"think": False}}) == (
        ["--chat_template_kwargs", '{"think": false}']
    )
    chats = [pair_of(), pair_of(system_prompt="S"), pair_of(chat_template_kwargs={"think": False})]
    assert [Pipeline(pair, Jobs(tmp_path), tmp_path).chat for pair in chats] == [
        {},
        {"chat_template": True, "system_prompt": "S"},
        {"chat_template": True, "chat_template_kwargs": {"think": False}},
    ]
    assert pipeline_module.tag({}) == ""
    assert pipeline_module.tag({"lora_r": 4, "points": "floor kl"}) == "-lora_r=4-points=floor_kl"
    long = [pipeline_module.tag({"name": letter * 200}) for letter in "ab"]
    assert long[0] != long[1] and len(long[0]) < 80


def test_pairs_are_read_and_refused(tmp_path):
    def write(name, **values):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    base = {"title": "P", "model": "m", "teacher_model": "t", "dataset": "d", "sizes": {"label": 5}}
    write("base", **base)
    pair = Pair.load(write("other", like="base", title="Q", num_seeds=2))
    assert (pair.name, pair.title, pair.model, pair.num_seeds) == ("other", "Q", "m", 2)
    pair = Pair.load(write("third", like="other", sizes={"test": 1}))  # like one that is like one
    assert (pair.title, pair.model, pair.num_seeds, pair.sizes) == ("Q", "m", 2, {"test": 1})
    write("one", like="two")
    for file in (write("two", like="one"), write("self", like="self"), write("typo", like="bsae")):
        with pytest.raises(ValueError, match="`like` must name another pair beside it, got '(two|self|bsae)'"):
            Pair.load(file)  # not a pair that is left out because its data are elsewhere
    with pytest.raises(ValueError, match="unknown keys .'modle'.; legal: .*'teacher_model'"):
        Pair.load(write("bad", **base, modle="x"))
    with pytest.raises(ValueError, match="missing .*'sizes'"):
        Pair.load(write("bad", **{name: value for name, value in base.items() if name != "sizes"}))
    with pytest.raises(ValueError, match="parts must be among label, .*, got 'tset'"):
        Pair.load(write("bad", **base | {"sizes": {"tset": 3}}))
    data = write("data", **base | {"dataset": "{data}/gsm8k"})
    with pytest.raises(FileNotFoundError, match="pass its folder as --data"):
        Pair.load(data)
    (tmp_path / "gsm8k").mkdir()
    assert Pair.load(data, str(tmp_path)).dataset == f"{tmp_path}/gsm8k"
    both = {"model": "{models}/small", "part_options": {"test": ["--source", "{data}/gsm8k"]}}
    both = write("both", **base | both)
    with pytest.raises(FileNotFoundError, match="wants {models}/small: pass its folder as --models"):
        Pair.load(both, str(tmp_path))
    (tmp_path / "small").mkdir()
    loaded = Pair.load(both, str(tmp_path), str(tmp_path))
    assert loaded.model == f"{tmp_path}/small" and loaded.part_options == {"test": ["--source", f"{tmp_path}/gsm8k"]}


def test_a_pair_says_how_far_its_sweeps_go(tmp_path):
    pipeline = Pipeline(pair_of(learning_rates={"sft": [0.3, 0.6]}, further_rates=0), Jobs(tmp_path), tmp_path)
    sweep = pipeline.sweep("sft", pipeline.labels("label"), calibration=pipeline.labels("calibration"))
    assert sorted(sweep.trained) == [0.3, 0.6] and sweep.outward() == ([], [])


def write_accuracies(sweep, found):
    """Reports of a sweep: rate -> accuracy on the tuning problems, or (seed, rate) -> the same."""
    for key, accuracy in found.items():
        report = (sweep.again[key[0]][key[1]][1] if isinstance(key, tuple) else sweep.reports[key]).output
        report.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"label": sweep_module.JUDGED_BY[sweep.method], "accuracy": accuracy}]
        report.write_text(json.dumps({"rows": rows}))


def test_a_sweep_is_the_training_with_the_best_tuning_accuracy(tmp_path):
    rates = {"s2t-local": [0.2, 0.1], "sft": [0.3, 0.4, 0.5]}
    pipeline = Pipeline(pair_of(learning_rates=rates), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    sweep = pipeline.sweep("sft", labels, calibration=calibration)
    trained = sweep.best()
    assert [best.seed for best in trained] == [None, 1, 2]
    job = pipeline.evaluation("x", policies=["greedy", "sft"], tuned=[("sft", job) for job in trained])
    others = {job for found in sweep.again.values() for jobs in found.values() for job in jobs}
    assert set(job.needs) >= {*sweep.trained.values(), *sweep.reports.values(), *others}

    write_accuracies(sweep, {0.3: 50.0, 0.4: 60.0, 0.5: 60.0})
    write_accuracies(sweep, {(seed, rate): 60.0 for seed in (1, 2) for rate in (0.4, 0.5)})
    same = [60.0] * 3
    assert sweep.accuracies() == {0.3: [50.0], 0.4: same, 0.5: same} and sweep.best_rate() == 0.4  # first of equals
    assert trained[0].path == sweep.trained[0.4].path
    for best in trained[1:]:
        arguments = sweep.again[best.seed][0.4][0].arguments()
        assert option(arguments, "output_dir") == [str(best.path)] and option(arguments, "seed") == [str(best.seed)]
        assert option(arguments, "learning_rate") == ["0.4"]
    given = [text for text in job.arguments() if text.startswith("sft=")]
    assert given == [f"sft={job.path}" for job in trained]
    judged = sweep.reports[0.3].arguments()
    assert option(judged, "tuned") == [f"sft={sweep.trained[0.3].path}"] and option(judged, "policies") == ["sft"]

    ours = pipeline.sweep("s2t-local", labels, calibration=calibration)
    write_accuracies(ours, {0.1: 70.0, 0.2: 65.0, 0.05: 65.0})
    assert ours.best_rate() == 0.1 and ours.accuracies() == {0.05: [65.0], 0.1: [70.0], 0.2: [65.0]}
    judged = ours.reports[0.05].arguments()
    assert option(judged, "adapters") == [str(ours.trained[0.05].path)]


@pytest.mark.parametrize(
    ("first", "found", "tried", "best"),
    [
        ([1, 2, 4], {1: 5, 2: 9, 4: 7}, [1, 2, 4], 2),  # it lies between others that were tried
        ([1, 2], {1: 9, 2: 5, 4: 7, 0.5: 8}, [0.5, 1, 2], 1),
        ([1, 2], {1: 5, 2: 9, 4: 5, 8: 99}, [1, 2, 4], 2),  # beyond a worse one nobody looks
        ([1, 2], {1: 5, 2: 6, 4: 7, 8: 8, 16: 9}, [1, 2, 4, 8, 16], 16),  # as far as it goes
        ([1, 2], {1: 5, 2: 4, 0.5: 6, 0.25: 6, 0.125: 7}, [0.25, 0.5, 1, 2], 0.5),  # equal: no reason to go on
        ([1, 4], {1: 5, 2: 8, 4: 6}, [1, 2, 4], 2),  # between two that were tried
        ([1, 4], {1: 5, 2: 8, 4: 9, 8: 7}, [1, 2, 4, 8], 4),
        ([1, 4, 16], {1: 5, 2: 9, 4: 6, 8: 6, 16: 5}, [1, 2, 4, 8, 16], 2),  # on both sides of the best of the first
        ([1, 4, 16], {1: 7, 2: 6, 4: 5, 16: 6, 0.5: 8, 0.25: 7}, [0.25, 0.5, 1, 2, 4, 16], 0.5),
        ([1, 3], {1: 5, 1.5: 7, 3: 6}, [1, 1.5, 3], 1.5),
    ],
)
def test_a_sweep_looks_around_the_best_and_goes_on_while_it_is_at_an_end(tmp_path, first, found, tried, best):
    pipeline = Pipeline(pair_of(learning_rates={"sft": first}), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    sweep = pipeline.sweep("sft", labels, calibration=calibration)
    within = {(1, 4): [2], (1, 4, 16): [2, 8], (1, 3): [1.5, 2]}.get(tuple(first), [])
    assert sorted(sweep.trained) == [0.125, 0.25, 0.5, *sorted(first + within), *(first[-1] * k for k in (2, 4, 8))]
    asked, left_out = [], []  # as it is while jobs run: nothing is asked before the reports that tell are there
    for rate in sweep.trained:
        jobs = {sweep.trained[rate], sweep.reports[rate]}
        before = {other for other in sweep.reports if sweep.reports[other] in sweep.trained[rate].needs}
        if rate in first:
            assert not before and all(job.only_if is None for job in jobs)
        else:
            assert before >= set(first) and all({sweep.reports[r] for r in before} <= set(job.needs) for job in jobs)
        assert before <= {*asked, *left_out}
        if all(job.only_if is None or job.only_if() for job in jobs):
            write_accuracies(sweep, {rate: found[rate]})
            asked.append(rate)
        else:
            left_out.append(rate)
    assert sorted(asked) == tried
    again = {rate for rate, (_, report) in sweep.again[1].items() if report.only_if()}
    write_accuracies(sweep, {(seed, rate): found[rate] for seed in (1, 2) for rate in again})
    assert list(sweep.accuracies()) == tried
    assert sweep.best_rate() == best and sweep.best()[0].path == sweep.trained[best].path


def test_rates_that_come_close_are_judged_by_all_seeds(tmp_path):
    """One seed does not tell a good rate from one at which some trainings fail."""
    pipeline = Pipeline(pair_of(learning_rates={"kd": [1, 2, 3]}), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    sweep = pipeline.sweep("kd", labels, calibration=calibration)
    close = 90.0 - sweep_module.CLOSE

    def asked():
        """Rates that the other seeds are trained with, and those at which they are measured."""
        for jobs in sweep.again.values():
            for trained, report in jobs.values():
                assert {*sweep.reports.values()} <= set(trained.needs) and trained in report.needs
        jobs = sweep.again[2]
        assert [rate for rate in jobs if jobs[rate][0].only_if()] == [
            rate for rate in jobs if sweep.again[1][rate][0].only_if()
        ]
        return [[rate for rate in jobs if jobs[rate][kind].only_if()] for kind in (0, 1)]

    write_accuracies(sweep, {1: close, 2: 90.0, 3: close - 0.1})
    assert asked() == [[1, 2], [1, 2]]
    write_accuracies(sweep, {(1, 1): 90.0, (1, 2): 91.0, (2, 1): 90.0, (2, 2): 60.0})  # one of three fails at 2
    assert sweep.best_rate() == 1
    assert sweep.accuracies() == {1: [close, 90.0, 90.0], 2: [90.0, 91.0, 60.0], 3: [close - 0.1]}
    assert [best.path for best in sweep.best()] == [
        job.path for job in (sweep.trained[1], sweep.again[1][1][0], sweep.again[2][1][0])
    ]
    second = sweep.best(place=1)
    assert [best.path for best in second] == [
        job.path for job in (sweep.trained[2], sweep.again[1][2][0], sweep.again[2][2][0])
    ]
    named = [("kd", best) for best in sweep.best()] + [("kd-second", best) for best in second]
    evaluation = pipeline.evaluation("x", policies=["greedy", "kd", "kd-second"], tuned=named)
    arguments = evaluation.arguments()
    assert option(arguments, "policies") == ["greedy", "kd", "kd-second"]
    assert option(arguments, "tuned") == [f"{name}={best.path}" for name, best in named]
    write_accuracies(sweep, {3: close + 0.1})
    assert asked() == [[2, 3], [2, 3]]  # no more than two
    write_accuracies(sweep, {1: close - 0.1, 3: close - 0.1})
    assert asked() == [[2], []] and sweep.best_rate() == 2  # nothing is left to be compared
    arguments = evaluation.arguments()  # and no second row
    assert not any(best.is_there for best in second) and option(arguments, "policies") == ["greedy", "kd"]
    assert option(arguments, "tuned") == [f"kd={best.path}" for best in sweep.best()]
    assert len(pipeline.sweep("kd", pipeline.labels("label", 5), calibration=calibration, seeds=[1]).best()) == 1


def test_planning_reads_a_report_once_and_a_rewritten_one_anew(tmp_path, monkeypatch):
    pipeline = Pipeline(pair_of(learning_rates={"kd": [1, 4]}), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    sweep = pipeline.sweep("kd", labels, calibration=calibration)
    with pytest.raises(FileNotFoundError):  # what is not there yet is not remembered
        sweep.ranked()
    write_accuracies(sweep, {1: 50.0, 4: 90.0, 2: 60.0, 8: 80.0})
    read, read_text = [], Path.read_text

    def count(file, *args, **options):
        read.append(file)
        return read_text(file, *args, **options)

    monkeypatch.setattr(Path, "read_text", count)
    for _ in range(3):
        assert sweep.ranked() == [4] and [best.path for best in sweep.best()[:1]] == [sweep.trained[4].path]
    assert sorted(read) == sorted(sweep.reports[rate].output for rate in (1, 2, 4, 8))
    read.clear()
    report = sweep.reports[2].output
    status = report.stat()
    write_json(report, json.loads(report.read_text()) | {"rows": [{"label": "kd", "accuracy": 95.0}]})
    os.utime(report, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if all within one tick of the clock
    read.clear()
    assert sweep.ranked() == [2] and read == [report]
    sweep.reports[4].output.unlink()
    with pytest.raises(FileNotFoundError):
        sweep.ranked()


def test_a_router_is_trained_once_for_all_selectors_that_would_have_the_same(tmp_path):
    pipeline = Pipeline(pair_of(learning_rates={"s2t-local": [0.1, 0.2]}), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    for _ in range(2):  # asked twice, the commands are the same
        sweep = pipeline.sweep("s2t-local", labels, calibration=calibration)
        pipeline.selector(labels, 1, calibration=calibration, rate=0.7)
        pipeline.selector(labels, 1, calibration=calibration, rate=0.8)
        pipeline.selector(labels, 0, calibration=calibration, rate=0.8)
        pipeline.selector(pipeline.labels("label", 5), 0, calibration=calibration, rate=0.8)
        pipeline.selector(labels, 0, calibration=calibration, rate=0.8, min_prob_ratio=0)
    routers = {name: job for name, job in pipeline.jobs.all.items() if name.startswith("p-router-")}
    taken = {}
    for name, job in routers.items():
        source = next(
            (text for flag, text in zip(job.arguments(), job.arguments()[1:]) if flag == "--router_of"), None
        )
        if source is not None:
            assert "--labels" not in job.arguments()
            (source,) = [job for job in job.needs if str(job.path) == source]
            assert source.only_if is None
        taken[name] = source
    first = pipeline.jobs.all["p-calibrate-label-learning_rate=0.1-undecoded-seed0"]
    own = {rate: taken[f"p-router-label-learning_rate={rate:g}-undecoded-seed0"] for rate in sweep.trained}
    assert own == {0.1: None} | {rate: first for rate in sweep.trained if rate != 0.1}
    assert taken["p-router-label-learning_rate=0.7-seed1"] is None  # none of the sweep's is trained in any case
    second = pipeline.jobs.all["p-calibrate-label-learning_rate=0.7-seed1"]
    assert taken["p-router-label-learning_rate=0.8-seed1"] is second
    assert taken["p-router-label-learning_rate=0.1-undecoded-seed1"] is None  # it was asked for before
    assert taken["p-router-label-learning_rate=0.8-seed0"] is first
    assert taken["p-router-label5-learning_rate=0.8-seed0"] is None  # of other labels
    assert taken["p-router-label-learning_rate=0.8-min_prob_ratio=0-seed0"] is None  # of other positions


def test_selectors_may_learn_from_other_texts_of_the_same_problems(tmp_path):
    texts = {"rollout_policy": "sample", "num_rollouts": 4}
    pipeline = Pipeline(pair_of(selector_label=texts, label_problems=60), Jobs(tmp_path), tmp_path)
    labels = pipeline.selector_labels()
    assert labels is pipeline.labels("label", **texts) is pipeline.selector_labels(60) and pipeline.num_rollouts == 4
    arguments = labels.arguments()
    assert option(arguments, "limit") == ["60"] and option(arguments, "num_rollouts") == ["4"]
    changed = pipeline.selector_labels(num_rollouts=1)
    assert option(changed.arguments(), "num_rollouts") == ["1"]
    assert option(changed.arguments(), "rollout_policy") == ["sample"]
    for method, given in (("sft-sampled", ["4"]), ("kd-sampled", None), ("sft", None)):
        arguments = pipeline.baseline(method, labels, rate=0.1).arguments()
        assert option(arguments, "method") == [method.removesuffix("-sampled")]
        assert ("--num_samples" in arguments and option(arguments, "num_samples")) == (given or False)
    plain = Pipeline(pair_of(), Jobs(tmp_path), tmp_path)
    assert plain.selector_labels() is plain.labels("label") and plain.num_rollouts == 1


def test_only_what_reads_the_teacher_is_given_one(tmp_path):
    pipeline = Pipeline(pair_of(), Jobs(tmp_path), tmp_path)
    cases = {"s2t-local:always": False, "s2t:always": True, "second:kl:0.1": True, "greedy": False, "teacher": True}
    for policy, wanted in cases.items():
        job = pipeline.evaluation(policy.replace(":", "_"), policies=[policy])
        assert ("--teacher_model" in job.arguments()) == wanted, policy


def test_jobs_are_named_by_what_they_differ_in(tmp_path):
    pipeline = Pipeline(pair_of(learning_rates={"s2t-local": [0.1, 0.2], "sft": [0.3, 0.4]}), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")
    fewer, tuning = pipeline.labels("calibration", 7), pipeline.labels("tuning")
    adapter = pipeline.selector(labels, calibration=calibration)
    sweeps = {method: pipeline.sweep(method, labels, calibration=calibration) for method in ("s2t-local", "sft")}
    pair_of_others = pair_of(learning_rates={"s2t-local": [0.2, 0.3]})

    def select(*args, **options):
        return pipeline.selector(*args, **({"calibration": calibration} | options))

    calls = {
        "labels": [
            lambda: labels,
            lambda: pipeline.labels("label", 50),
            lambda: pipeline.labels("label", 5),
            lambda: pipeline.labels("label", points="kl"),
            lambda: pipeline.labels("label", 5, points="kl"),
            lambda: pipeline.labels("label", points="kl", max_points=3),
            lambda: pipeline.labels("label", rollout_policy="s2t-local", adapter=adapter),
            lambda: fewer,
            lambda: tuning,
        ],
        "selectors": [
            lambda: adapter,
            lambda: select(labels, 1),
            lambda: select(labels, decode=False),
            lambda: select(labels, route=False),
            lambda: select(labels, route=False, decode=False),
            lambda: select(labels, calibration=fewer),
            lambda: select(labels, lora_r=4),
            lambda: select(labels, lora_r=41),
            lambda: select(labels, lora_r=4, temperature=1.0),
            lambda: select(labels, rate=0.5),
            lambda: select(labels, rate=sweeps["s2t-local"]),
            lambda: select(pipeline.labels("label", 50)),
        ],
        "baselines": [
            lambda: pipeline.baseline("sft", labels, rate=0.1),
            lambda: pipeline.baseline("kd", labels, rate=0.1),
            lambda: pipeline.baseline("sft", labels, 1, rate=0.1),
            lambda: pipeline.baseline("sft", labels, rate=0.01),
            lambda: pipeline.baseline("sft", labels, rate=sweeps["sft"]),
            lambda: pipeline.baseline("sft", labels, rate=0.1, num_train_epochs=3),
        ],
    }
    for kind, makers in calls.items():
        made = [make() for make in makers]
        assert len({job.name for job in made}) == len({job.path for job in made}) == len(made), kind
        known = len(pipeline.jobs.all)
        assert [make() for make in makers] == made and len(pipeline.jobs.all) == known  # the same again
    assert len({job.output for job in pipeline.jobs.all.values()}) == len(pipeline.jobs.all)
    with pytest.raises(ValueError, match="Two jobs are named 'p-evaluate-x'"):
        for policies in (["greedy"], ["teacher"]):
            pipeline.evaluation("x", policies=policies)
    others = Pipeline(pair_of_others, Jobs(tmp_path), tmp_path).sweep("s2t-local", labels, calibration=calibration)
    with pytest.raises(ValueError, match="Two jobs are named 'p-train-label-best-seed0'"):
        pipeline.selector(labels, calibration=calibration, rate=others)


def test_the_demo_trains_as_the_tables_do():
    """recipes/embedded/*.yaml, which `make demo` reads, and the pair of the tables say the same."""
    pair = Pair.load(paper.PAPER / "pairs" / "embedded.yaml")
    files = (RECIPES / "embedded" / f"{name}.yaml" for name in ("label", "train"))
    label, train = map(pair_module.read_yaml, files)
    names = ("model", "teacher_model", "max_new_tokens", "batch_size", "dtype")
    assert label == {name: getattr(pair, name) for name in names} | pair.selector_label
    assert pair.train.items() <= train.items()


def test_label_problems_of_a_pair_are_a_limit_like_any_other(tmp_path):
    pipeline = Pipeline(pair_of(label_problems=60), Jobs(tmp_path), tmp_path)
    assert pipeline.labels("label") is pipeline.labels("label", 60)
    assert pipeline.labels("test") is not pipeline.labels("test", 30)
    with pytest.raises(ValueError, match="The pair 'p' has no part 'fresh': name its size under `sizes`"):
        pipeline.labels("fresh")


def closure(job):
    """All jobs that must have run before a job."""
    found, waiting = set(), list(job.needs)
    while waiting:
        need = waiting.pop()
        if need not in found:
            found.add(need)
            waiting += need.needs
    return found


def option(arguments, name):
    """What follows `--name`, up to the next option."""
    texts = arguments[arguments.index(f"--{name}") + 1 :]
    end = next((place for place, text in enumerate(texts) if text.startswith("--")), len(texts))
    return texts[:end]


def test_a_selector_on_top_of_a_tuned_student_reads_nothing_of_the_untuned(tmp_path):
    rates = {"sft": [0.3, 0.4]}
    pipeline = Pipeline(pair_of(learning_rates=rates, dtype="float32"), Jobs(tmp_path), tmp_path)
    sweep = pipeline.sweep("sft", pipeline.labels("label"), calibration=pipeline.labels("calibration"))
    best = sweep.best()[0]
    on_top = pipeline.on_top_of(best, "sft0")
    assert pipeline.on_top_of(best, "sft0").models == on_top.models
    (merge,) = on_top.models
    pipeline.data("test")
    before = set(pipeline.jobs.all)
    calibration = on_top.labels("calibration")
    adapter = on_top.selector(on_top.labels("label"), calibration=calibration, decode=False)
    on_top.evaluation("x", policies=["greedy", "teacher"], adapters=[adapter])
    new = [job for name, job in pipeline.jobs.all.items() if name not in before]
    assert len(new) == 6 and all("sft0-" in job.name for job in new)  # two of labels, three of the selector, x
    for made in new:
        assert option(made.arguments(), "model") == [str(merge.path)] and merge in closure(made)
    assert "-calibration" not in adapter.name  # that of its own student goes without saying
    assert set(merge.needs) == set(sweep_module.jobs_behind(sweep))
    write_accuracies(sweep, {0.3: 50.0, 0.4: 60.0, 0.8: 55.0})
    command = merge.arguments()
    assert option(command, "adapter") == [str(sweep.trained[0.4].path)] and option(command, "model") == ["M"]
    assert option(command, "dtype") == ["float32"]
    again = on_top.on_top_of(sweep.trained[0.3], "twice")  # of what is merged already
    assert option(again.models[0].arguments(), "model") == [str(merge.path)] and merge in again.models[0].needs


def test_without_decoding_a_selector_is_calibrated_for_its_fusion_alone(tmp_path):
    from trl import TrlParser

    calibrated = {"target_rates": [0.01, 0.2], "check_share": 0.5}
    pipeline = Pipeline(pair_of(calibrate=calibrated), Jobs(tmp_path), tmp_path)
    labels, calibration = pipeline.labels("label"), pipeline.labels("calibration")

    def read(**options):
        job = pipeline.selector(labels, calibration=calibration, **options)
        (args,) = TrlParser(calibrate.CalibrateArguments).parse_args_and_config(job.arguments()[1:])
        assert args.adapter == str(job.path) and args.labels == str(calibration.path)
        return args

    whole = read()
    assert (whole.teacher_model, whole.deployed, whole.check_share, whole.target_rates) == (
        "T",
        True,
        0.5,
        [0.01, 0.2],
    )
    fused = read(decode=False)
    assert (fused.teacher_model, fused.deployed, fused.triggers) == (None, False, ["margin"])
    adapted = read(decode=False, adapter_scope="sequence", proposals="adapted", route=False)
    assert (adapted.teacher_model, adapted.deployed, adapted.limit) == (None, True, 20)  # its labels hold no such text
    assert adapted.check_share == 0
    config = SelectorConfig(tuple(range(16)), adapter_scope="sequence", proposals="adapted")
    assert calibrate.choose_triggers(adapted, config) == ["margin"]
    assert calibrate.choose_triggers(fused, SelectorConfig(tuple(range(16)))) == ["margin"]


def test_options_of_a_part_reach_the_bed(tmp_path, monkeypatch, capsys):
    options = {"label": ["--without", "dozen", "takes"], "test": ["--only-with", "dozen"]}
    sizes = {"label": 9, "tuning": 4, "test": 8, "words": 3, "fresh": 0}
    pipeline = Pipeline(pair_of(sizes=sizes, part_options=options, data_seed=5), Jobs(tmp_path), tmp_path)
    kinds = {
        "label": corpus.KindFilter(without=frozenset({"dozen", "takes"})),
        "tuning": corpus.ALL_KINDS,
        "test": corpus.KindFilter(only_with=frozenset({"dozen"})),
    }
    for part in ("label", "tuning", "test", "words"):
        job = pipeline.data(part)
        monkeypatch.setattr(sys, "argv", job.arguments())
        assert sys.argv[0] == "recipes/embedded/corpus.py" and not job.output.exists()
        corpus.main()
        rows = [json.loads(line) for line in job.output.read_text().splitlines()]
        expected = (
            corpus.build_words(3, 5) if part == "words" else corpus.build_split(part, sizes[part], 5, kinds[part])
        )
        assert rows == expected
    assert len(list(job.output.parent.iterdir())) == 4  # each its own part, and nothing else


MODULES = {
    "agreement": agreement,
    "calibrate": calibrate,
    "eval": evaluation,
    "label": label,
    "merge": merge,
    "retention": retention,
    "splits": splits,
    "train": train,
    "train_baseline": imitate,
    "train_router": router,
}


def options_of(script: str) -> set[str]:
    """Names of the command-line options of a recipe."""
    import dataclasses

    from transformers import TrainingArguments
    from trl import SFTConfig

    name = Path(script).stem
    if name in ("splits", "corpus", "merge") or "benchmarks" in script:
        import re

        options = {text for part in splits.PROBLEM_PARTS for text in (part, f"num-{part}")}
        options |= {"without", "only-with", "num-words"}
        source = Path(script if name not in MODULES else MODULES[name].__file__)
        return options | set(re.findall(r'"--([\w-]+)"', source.read_text()))
    module = MODULES[name]
    found = [value for value in vars(module).values() if dataclasses.is_dataclass(value)]
    found += [SFTConfig] if name == "train_baseline" else []
    found = [one for one in found if one is not TrainingArguments]
    return {f.name for one in found for f in dataclasses.fields(one)}


def test_commands_are_told_without_the_folders_of_a_machine():
    places = {"/home/me/runs": "runs/paper", "/home/me": "DATA", "../models/": "MODELS"}
    command = (
        "python x.py --model ../models/small --a /home/me/runs/q/labels '/home/me/gsm8k' --b /home/mead ../models"
    )
    told = "python x.py --model MODELS/small --a runs/paper/q/labels 'DATA/gsm8k' --b /home/mead MODELS"
    assert paper.placeless(command, places) == told


def test_every_checked_in_table_can_be_planned(tmp_path):
    """For every pair that it names, and every option of every command exists."""
    models = ("babyllama-weak", "babyllama-strong", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m")
    for folder in (*(Path("models", name) for name in models), "gsm8k", "math500/test.jsonl", "svamp"):
        (tmp_path / folder).mkdir(parents=True)
    tables = sorted((RECIPES / "paper").glob("*.yaml"))
    assert tables
    known: dict[str, set[str]] = {}
    for file in tables:
        spec = paper.read_table(file)
        for name in [*spec["pairs"], "qwen2.5-0.5b", "qwen2.5-1.5b"]:
            pair = Pair.load(RECIPES / "paper" / "pairs" / f"{name}.yaml", str(tmp_path), str(tmp_path / "models"))
            if not pair.has_answers and spec["kind"] not in paper.WITHOUT_ANSWERS:
                continue
            planned = Jobs(tmp_path / name)
            paper.KINDS[spec["kind"]](Pipeline(pair, planned, tmp_path / name), spec)
            assert planned.all, (file, name)
            for job in planned.all.values():
                if callable(job.command):
                    continue  # it waits for a sweep; its form is that of the others
                script, *arguments = job.arguments()
                assert Path(script).is_file(), script
                if script not in known:
                    known[script] = options_of(script)
                used = {text[2:] for text in arguments if text.startswith("--")}
                assert used <= known[script], (script, used - known[script])


def test_all_tables_together_read_nothing_that_was_not_made_before(tmp_path, monkeypatch):
    """Of all checked-in tables on one pair, in one run: nothing is written twice, and what is read is waited for."""
    monkeypatch.setattr(Sweep, "ranked", lambda self: list(self.trained)[-2:])
    planned = Jobs(tmp_path)
    pipeline = Pipeline(Pair.load(RECIPES / "paper" / "pairs" / "embedded.yaml"), planned, tmp_path)
    for file in sorted((RECIPES / "paper").glob("*.yaml")):
        spec = paper.read_table(file)
        paper.KINDS[spec["kind"]](pipeline, spec)
    assert len(planned.all) > 100
    assert len({job.output for job in planned.all.values()}) == len(planned.all)
    makers = {}
    for job in planned.all.values():
        for path in {job.path, job.output}:
            makers.setdefault(str(path), []).append(job)
    known = set()
    for job in planned.all.values():
        needs = closure(job)
        assert set(job.needs) <= known, job.name  # it was added before: jobs run in that order where they can
        known.add(job)
        for text in job.arguments():
            path = text.partition("=")[2] if re.match("(sft|kd)[a-z-]*=", text) else text
            for maker in makers.get(path, ()):
                beside = maker.output.parent == job.output.parent and job in closure(maker) | {maker}
                assert maker in needs or beside, (job.name, text)


def test_the_command_refuses_what_there_is_not(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="`tables` must be among .*comparison.*, got 'comparsion'"):
        paper.main(["--tables", "comparsion"])
    with pytest.raises(ValueError, match="`pairs` must be among .*embedded.*, got 'x'"):
        paper.main(["--pairs", "x"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("title: a\ntext: b\nkind: c\npairs: []\n")
    with pytest.raises(ValueError, match="`kind` must be one of .*, got 'c'"):
        paper.main(["--tables", str(bad)])
    with pytest.raises(SystemExit):
        paper.main(["--num_parallel", "0"])
    paper.main(["--tables", "local_sufficiency", "--dry_run", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "embedded-labels-test" in printed and "babyllama" in printed  # left out, and it says so
    assert not (tmp_path / "embedded").exists()


@pytest.fixture
def run_paper(tmp_path, monkeypatch):
    """Runs recipes/paper.py on a table of a kind of its own, whose single job writes a number."""
    from s2t_recipes.paper.tables import Result

    script = tmp_path / "number.py"
    script.write_text("import sys\nopen(sys.argv[1], 'w').write(sys.argv[2] or [][0])")
    (tmp_path / "pair.yaml").write_text(
        yaml.safe_dump({"title": "P", "model": "m", "teacher_model": "t", "dataset": "d", "sizes": {"test": 1}})
    )
    spec = {"title": "T", "text": "What it is.", "kind": "number", "pairs": [str(tmp_path / "pair.yaml")]}

    def number(pipeline, spec):
        output = pipeline.folder / "number"
        job = pipeline.add("number", output, [str(script), str(output), str(spec["number"])])
        columns = [("number", "n", "0f"), ("nothing", "m", "text")]
        return lambda: Result(columns, [{"n": float(job.output.read_text())}], ["a note"], ["python x"])

    monkeypatch.setitem(paper.KINDS, "number", number)
    for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # `main` sets them, in this process too: they are put back

    def run(*arguments, **changes):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(spec | {"number": 7} | changes))
        folders = ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        paper.main(["--tables", str(tmp_path / "table.yaml"), *folders, *arguments])

    return run


def test_a_table_is_made_from_its_jobs_and_again_where_they_change(tmp_path, run_paper, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(results, "TEXTS", (readme,))
    text = "<!-- results: another_table p -->\n<!-- end -->\n"  # of docs/results, not of this folder
    readme.write_text(text)
    run_paper("--dry_run")
    assert "1 tables, 1 jobs, 1 of them to run" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()
    for _ in range(2):
        run_paper()
    assert "1 jobs, 0 of them to run" in capsys.readouterr().out
    content = json.loads((tmp_path / "results" / "table.json").read_text())
    entry = content["pairs"]["pair"]
    assert (content["title"], content["command"]) == ("T", "python recipes/paper.py --tables table")
    assert entry["rows"] == [{"n": 7.0}] and entry["seeds"] == "0 to 2" and entry["commands"] == ["python x"]
    page = (tmp_path / "results" / "table.md").read_text()
    assert page.startswith("# T\n\nWhat it is.\n\n```bash\npython recipes/paper.py --tables table\n```\n\n## P\n\n")
    assert "| number |\n|---:|\n| 7 |\n\n- a note\n\nSeeds 0 to 2; " in page and "nothing" not in page
    assert json.loads((tmp_path / "runs" / "pair" / "pair.json").read_text())["title"] == "P"
    run_paper(number=8)
    assert "| 8 |" in (tmp_path / "results" / "table.md").read_text()
    with pytest.raises(jobs_module.JobFailed, match="IndexError"):
        run_paper(number="")
    assert "| 8 |" in (tmp_path / "results" / "table.md").read_text()
    assert readme.read_text() == text


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_cells():
    row = {"a": 12.345, "a_ci": [1.0, 20.06], "b": None, "n": 1234567.2, "p": 0.0004, "s": 0.1234, "t": "x|y"}
    assert results.cell(row, "a", "interval") == "12.3 [1.0, 20.1]"
    assert results.cell(row, "a", "signed interval") == "+12.3 [+1.0, +20.1]"
    assert results.cell(row, "b", "1f") == "" and results.cell(row, "missing", "text") == ""
    assert results.cell(row, "n", "count") == "1 234 567"
    assert results.cell(row, "p", "p") == "<.001" and results.cell({"p": 0.25}, "p", "p") == ".250"
    assert results.cell({"p": 1.0}, "p", "p") == "1"
    assert results.cell(row, "s", "share") == "12.3" and results.cell(row, "a", "0f") == "12"
    columns = [["T", "t", "text"], ["B", "b", "1f"], ["A", "a", "2f"]]
    assert results.table(columns, [row]) == "| T | A |\n|---|---:|\n| x\\|y | 12.35 |"


def test_a_text_is_filled_with_tables():
    found = {
        "f": {"pairs": {"p": {"columns": [["A", "a", "text"], ["B", "b", "0f"]], "rows": [{"a": 1, "b": 2}] * 2}}}
    }
    text = "x\n<!-- results: f p a rows 1 -->\nold\nrows\n<!-- end -->\ny"
    filled = results.fill(text, found)
    assert filled == "x\n<!-- results: f p a rows 1 -->\n\n| A |\n|---|\n| 1 |\n\n<!-- end -->\ny"
    assert results.fill(filled, found) == filled
    with pytest.raises(ValueError, match="names results that there are not"):
        results.fill("<!-- results: g p -->\n<!-- end -->", found)
    with pytest.raises(ValueError, match="has no <!-- end --> behind it"):
        results.fill("<!-- results: f p -->\n", found)
    with pytest.raises(ValueError, match="'<!-- results: f p a -->' has no <!-- end --> behind it"):
        results.fill("<!-- results: f p a -->\nwhat would be lost\n<!-- results: f p -->\n<!-- end -->", found)
    for wrong in ("c", "a c", "a rows 2", "rows -1"):
        with pytest.raises(ValueError, match="f p .* must name columns among a, b and 2 rows from 0"):
            results.fill(f"<!-- results: f p {wrong} -->\n<!-- end -->", found)


def test_published_tables_are_what_their_files_say():
    """docs/results/*.md and the README's tables: regenerated, they come out as they are."""
    for file, text in results.pages().items():
        assert file.read_text(encoding="utf-8") == text, f"{file}: run python recipes/results.py"


def table_of(**pairs):
    """A file of results with one row and one note for each pair, or what else is given of it."""
    entry = {"title": "P", "columns": [["A", "a", "1f"]], "rows": [{"a": 1.0}], "notes": ["n"], "cost": {"a": 3.0}}
    entry |= {"versions": {"torch": "2"}, "device": "CPU", "seeds": "0", "commands": [], "holds_times": False}
    return {"title": "T", "text": "t", "command": "c", "pairs": {name: entry | more for name, more in pairs.items()}}


def test_two_runs_are_compared_in_all_but_times():
    ours = {"f": table_of(p={}, q={}), "times": table_of(p={"holds_times": True}), "mine": table_of(p={})}
    other = {"cost": {"a": 4.0}, "device": "GPU", "versions": {"torch": "3"}}
    same = {"f": table_of(q=other), "times": table_of(p={"holds_times": True, "rows": [{"a": 9.0}]})}
    assert results.differences(ours, same) == []
    for changes, message in [
        ({"rows": [{"a": 1.0001}]}, "f, p, row 0: a 1.0 and 1.0001"),
        ({"rows": [{"a": 1.0, "b": 2}]}, "f, p, row 0: b None and 2"),
        ({"rows": [{}]}, "f, p, row 0: a 1.0 and None"),
        ({"rows": [{"a": 1.0}, {"a": 2.0}]}, "f, p: 1 and 2 rows"),
        ({"rows": []}, "f, p: 1 and 0 rows"),
        ({"notes": []}, "f, p: other notes"),
    ]:
        assert results.differences(ours, same | {"f": table_of(q={}, p=changes)}) == [message]
        assert len(results.differences(same | {"f": table_of(p=changes)}, ours)) == 1


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder of results with its page, and a README with a table of it; runs recipes/results.py."""
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    (folder / "f.json").write_text(json.dumps(table_of(p={})))
    readme.write_text("x\n<!-- results: f p -->\n<!-- end -->\ny\n")
    pages = results.pages
    monkeypatch.setattr(results, "RESULTS", folder)
    monkeypatch.setattr(results, "pages", lambda: pages(folder, (readme,)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["results.py", *arguments])
        try:
            results.main()
        except SystemExit as error:
            return error.code
        return 0

    return folder, readme, run


def test_pages_that_are_out_of_date_are_told_and_rewritten(published, capsys):
    folder, readme, run = published
    before = readme.read_text()
    assert run("--check") == 1
    assert readme.read_text() == before and not (folder / "f.md").exists()
    told = capsys.readouterr().out
    assert f"{folder / 'f.md'}: out of date" in told and f"{readme}: out of date" in told
    assert run() == 0
    assert "| 1.0 |" in readme.read_text() and "- n" in (folder / "f.md").read_text()
    assert "written" in capsys.readouterr().out
    assert run("--check") == run() == 0 and capsys.readouterr().out == ""
    (folder / "f.json").write_text(json.dumps(table_of(p={"rows": [{"a": 2.0}]})))
    assert run("--check") == 1
    capsys.readouterr()
    (folder / "f.json").write_text(json.dumps(table_of(p={"cost": {"a": 5.0}})))
    assert run("--check") == 0  # times are on no page


def test_another_run_is_the_same_or_not(published, tmp_path, capsys):
    folder, _, run = published
    again = tmp_path / "again"
    again.mkdir()
    for place in (again, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="`same`: '.*' has no table of docs/results that could be compared"):
            run("--same", str(place))
    for file, content in (("f", table_of(q={})), ("times", table_of(p={}))):  # of another pair; times
        (folder / "times.json").write_text(json.dumps(table_of(p={"holds_times": True})))
        (again / f"{file}.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no table of docs/results that could be compared"):
            run("--same", str(again))
    (again / "f.json").write_text(json.dumps(table_of(p={})))
    (again / "g.json").write_text(json.dumps(table_of(p={})))
    assert run("--same", str(again)) == 0
    assert capsys.readouterr().out == "the same: f (p)\n"
    (again / "f.json").write_text(json.dumps(table_of(p={"rows": [{"a": 1.5}]})))
    assert run("--same", str(again)) == 1
    assert capsys.readouterr().out == "f, p, row 0: a 1.0 and 1.5\n"
    assert not (folder / "f.md").exists()  # it compares, and writes nothing


def test_figures_of_one_pair_leave_those_of_others(tmp_path):
    from s2t_recipes.paper.tables import Result

    spec = {"title": "T", "text": "t", "pairs": ["embedded", "q"], "kind": "policies"}
    file = tmp_path / "x.json"
    for name in ("q", "embedded"):
        result = Result([("A", "a", "1f")], [{"a": float(len(name))}])
        paper.write_table(file, spec, "c", pair_of() if name == "q" else pair_of(num_seeds=2), result, {})
    content = json.loads(file.read_text())
    assert list(content["pairs"]) == ["p"]  # both were called p: the later one stays
    assert content["pairs"]["p"]["rows"] == [{"a": 8.0}] and content["pairs"]["p"]["seeds"] == "0 to 1"
    assert "| 8.0 |" in results.page(content)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_one_part_is_what_it_is_among_all(tmp_path, monkeypatch):
    rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(300)]
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"label": 100, "tuning": 20, "test": 40}
    for only in (None, "tuning"):
        folder = tmp_path / str(only)
        options = [] if only is None else ["--only", only]
        command = splits.split_command("recipes/splits.py", str(source), str(folder), sizes, 3, options)
        monkeypatch.setattr(sys, "argv", command)
        splits.main()
    assert [file.name for file in (tmp_path / "tuning").iterdir()] == ["tuning.jsonl"]
    assert (tmp_path / "tuning" / "tuning.jsonl").read_bytes() == (tmp_path / "None" / "tuning.jsonl").read_bytes()
    command = ["splits.py", "--dataset", str(source), "--output_dir", str(tmp_path / "none")]
    for sizes in ([], ["--label", "-1", "--test", "5"], ["--label", "5", "--only", "test"], ["--only", "test"]):
        monkeypatch.setattr(sys, "argv", [*command, *sizes])
        with pytest.raises(SystemExit, match="2"):
            splits.main()
    assert not (tmp_path / "none").exists()


def test_times_are_not_in_the_tables():
    """Two runs must agree on a table, and no two runs take the same time."""
    content = {"title": "T", "text": "t", "command": "c", "pairs": {}}
    entry = {"title": "P", "columns": [["A", "a", "text"]], "rows": [{"a": "b"}], "notes": [], "versions": {}}
    content["pairs"]["p"] = entry | {"seeds": "0", "device": "d", "cost": {"x": {"seconds_vs_greedy": 98765.4321}}}
    assert "98765" not in results.page(content)
