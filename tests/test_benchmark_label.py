"""What benchmarks/label.py compares and writes, on its tiny shape and on the pair that ships here. Nothing here
depends on how long a run takes."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import label
import pytest
import torch


P, S, K = 5, 7, 4
ARGUMENTS = "--shape tiny --prompt_tokens 5 --new_tokens 7 --num_candidates 4 --batch_sizes 3 2 --turns 2".split()
ARGUMENTS += ["--threads", "1"]
ROW = {"name", "batch_size", "dtype", "positions_per_second", "speedup_over_stepwise", "speedup_range", "turns"}
ROW |= {"cpu_speedup_over_stepwise"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `main` wrote and printed for the tiny shape."""
    file, printed = tmp_path_factory.mktemp("benchmarks") / "new" / "label.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        label.main([*ARGUMENTS, "--json", str(file)])
    return json.loads(file.read_text()) | {"printed": printed.getvalue(), "folder": file.parent}


@pytest.fixture(scope="module")
def both():
    """What is labelled, with every position stored, the pipeline's rows and stepwise's texts and scores."""
    work = label.make_work(label.parse_arguments(ARGUMENTS))
    work = work._replace(header=dataclasses.replace(work.header, points="all"))
    return work, label.run_pipeline(work, batch_size=2)[1], label.run_stepwise(work, cached=True)[1]


def test_rows_and_meta_have_what_readers_of_the_file_expect(run):
    assert [(row["name"], row["batch_size"]) for row in run["rows"]] == [
        ("stepwise", 1),
        ("pipeline", 3),
        ("pipeline", 2),
    ]
    for row in run["rows"]:
        assert set(row) == ROW and (row["dtype"], row["turns"]) == ("float32", 2)
        low, high = row["speedup_range"]
        assert row["positions_per_second"] > 0 and 0 < low <= row["speedup_over_stepwise"] <= high
        assert row["cpu_speedup_over_stepwise"] > 0
    assert run["rows"][0]["speedup_range"] == [1, 1]
    meta = run["meta"]
    assert {"threads", "device", "torch", "transformers", "settings"} <= set(meta)
    assert (meta["shape"], meta["teacher_shape"], meta["stepwise_cache"]) == ("tiny", "tiny-wide", "both")
    assert meta["rows_agree"] and str(run["folder"]) not in json.dumps(meta)


def test_every_position_is_counted_and_compared(run):
    meta = run["meta"]
    assert (meta["stepwise_positions"], meta["pipeline_positions"]) == (2 * S, 3 * S)
    assert meta["compared_positions"] == 2 * 2 * 2 * S  # turns, batch sizes, problems of stepwise


def test_the_table_has_a_line_for_each_way(run):
    lines = run["printed"].splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("stepwise  ", "pipeline  "))] == [
        ["stepwise", "1"],
        ["pipeline", "3"],
        ["pipeline", "2"],
    ]
    assert f"with both KV caches; the same rows at {8 * S} positions" in run["printed"]


def test_caches_do_not_change_what_stepwise_says_but_what_it_runs(both):
    work, _, steps = both
    pair, one = (work.model, work.teacher_model), work._replace(prompts={"0": work.prompts["0"]})
    widths = {True: [], False: []}
    for cached, seen in widths.items():
        hooks = [
            model.model.register_forward_pre_hook(
                lambda module, call, inputs, seen=seen: seen.append(inputs["input_ids"].shape), with_kwargs=True
            )
            for model in pair
        ]
        again = label.run_stepwise(one, cached)[1][0]
        for hook in hooks:
            hook.remove()
        assert again[0] == steps[0][0]
        for column, expected in zip(again[1], steps[0][1]):
            torch.testing.assert_close(column, expected, rtol=1e-4, atol=1e-4)
    twice = [(1, width) for width in [P, *[1] * (S - 1)] for _ in pair]  # the student, then the teacher
    assert widths[True] == twice
    assert widths[False] == [(1, width) for width in range(P, P + S) for _ in pair]


def test_models_of_which_one_knows_more_are_both_asked(both):
    work, _, steps = both
    assert work.teacher_model.config.hidden_size == 2 * work.model.config.hidden_size
    assert all(float(scores.divergence_S.min()) > 1e-4 for _, scores, _ in steps)


def changed(row, name, s, value):
    return row | {name: [value if i == s else old for i, old in enumerate(row[name])]}


def test_rows_that_differ_are_found(both):
    _, rows, steps = both
    row, step = rows[1], steps[1]
    assert label.compare(row, *step, 1e-3) == S
    wrong = [changed(row, name, 3, row[name][3] + 0.01) for name in ("divergence", "entropy", "margin")]
    for name in ("student_logprobs", "teacher_logprobs"):
        values = [row[name][3][0], row[name][3][1] - 0.01, *row[name][3][2:]]
        wrong.append(changed(row, name, 3, values))
    wrong.append(changed(row, "candidate_ids", 3, [999, *row["candidate_ids"][3][1:]]))
    wrong.append(changed(row, "teacher_top_id", 3, row["teacher_top_id"][3] + 1))
    wrong.append(changed(row, "input_ids", P + 3, row["input_ids"][P + 3] + 1))
    wrong.append(row | {"input_ids": row["input_ids"][:-1]})
    for other in wrong:
        with pytest.raises(label.RowsDiffer, match="problem 1, position"):
            label.compare(other, *step, 1e-3)


def test_texts_that_part_at_a_tie_are_compared_up_to_there(both):
    _, rows, steps = both
    text, scores, gaps = steps[1]
    margin_S = scores.margin_S.clone()
    margin_S[3] = 0.0
    row = changed(changed(rows[1], "margin", 3, 0.0), "input_ids", P + 3, text[P + 3] + 1)
    assert label.compare(row, text, scores._replace(margin_S=margin_S), gaps, 1e-3) == 4


def test_a_run_whose_rows_differ_fails_in_one_line(monkeypatch, tmp_path):
    stepwise = label.run_stepwise

    def other(work, cached):
        return stepwise(work._replace(teacher_model=work.model), cached)

    monkeypatch.setattr(label, "run_stepwise", other)
    with pytest.raises(SystemExit) as error:
        label.main([*ARGUMENTS, "--json", str(tmp_path / "label.json")])
    assert error.value.code.startswith("label.py: the two ways do not agree: `divergence` differs at problem 0")
    assert not list(tmp_path.iterdir())


FEW = "--num_problems 6 --stepwise_problems 3 --batch_sizes 4 --turns 1 --new_tokens 40 --threads 1".split()


def test_the_pair_that_ships_here_labels_its_own_problems(tmp_path, capsys):
    """Real problems end where the student ends them, and not every position is stored."""
    label.main([*FEW, "--json", str(tmp_path / "label.json")])
    meta = json.loads((tmp_path / "label.json").read_text())["meta"]
    assert meta["settings"]["model"] == "student" and meta["shape"] is None and meta["rows_agree"]
    assert 30 < meta["compared_positions"] == meta["stepwise_positions"] < 3 * 40
    assert "student and teacher, problems of recipes/embedded, float32" in capsys.readouterr().out
    work = label.make_work(label.parse_arguments(FEW))
    rows = label.run_pipeline(work, 4)[1]
    assert 0 < sum(len(row["positions"]) for row in rows) < sum(len(row["divergence"]) for row in rows)


def test_named_models_are_loaded_and_their_place_is_not_told(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(f'{{"q": "Tom has {i} nuts."}}\n' for i in range(20, 26)))
    flags = ["--model", str(label.EMBEDDED / "teacher"), "--teacher_model", str(label.EMBEDDED / "student")]
    flags += ["--dataset", str(tmp_path / "questions.jsonl"), "--prompt_column", "q", "--max_prompt_tokens", "4"]
    label.main([*FEW, *flags, "--dtype", "bfloat16", "--json", str(tmp_path / "label.json")])
    meta = json.loads((tmp_path / "label.json").read_text())["meta"]
    assert (meta["settings"]["model"], meta["settings"]["dataset"]) == ("teacher", "questions.jsonl")
    assert str(tmp_path) not in json.dumps(meta) and str(label.EMBEDDED) not in json.dumps(meta)
    assert not meta["rows_agree"] and meta["compared_positions"] == 0
    with pytest.raises(SystemExit, match="label.py: --num_problems must be at most 6"):
        label.main([*FEW, *flags, "--num_problems", "7"])


def test_quick_is_a_preset_that_flags_win_over():
    args = label.parse_arguments(["--shape", "small", "--quick", "--turns", "2"])
    assert (args.shape, args.teacher_shape, args.turns, args.stepwise_problems) == ("small", "small-wide", 2, 1)
    assert (args.prompt_tokens, args.new_tokens, args.batch_sizes, args.num_problems) == (128, 128, [32], 32)
    assert label.parse_arguments(["--shape", "small"]).new_tokens == 256
    args = label.parse_arguments(["--quick", "--turns", "2"])
    assert (Path(args.model).name, args.new_tokens, args.num_problems, args.turns) == ("student", 72, 256, 2)


BAD = {
    "--prompt_tokens 0": "--prompt_tokens must be at least 1",
    "--new_tokens 1": "--new_tokens must be at least 2",
    "--num_candidates 65": "--num_candidates must be at most 64",
    "--batch_sizes 4 0": "--batch_sizes must be at least 1",
    "--num_problems 1": "--stepwise_problems must be at most 1",
    "--model x": "--model and --teacher_model must be given together",
    "--model x --teacher_model y": "--dataset must be given with --model",
    "--dataset x": "--model must be given with --dataset",
    "--shape tiny --model x --split y": "--model, --split must not be given",
    "--num_layers 2": "--shape must be given with --num_layers",
    "--shape tiny --vocab_size 34": "--vocab_size must be at least 35",
    "--turns 0": "--turns must be at least 1",
    "--stepwise_cache student": "invalid choice",
    "--device cuda": "no CUDA device",
    "--json .": "must name a file",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_is_one_line_before_anything_is_built(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(label, "make_work", lambda *args: pytest.fail("started"))
    with pytest.raises(SystemExit) as error:
        label.main(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert said.startswith("label.py: ") and message in said
