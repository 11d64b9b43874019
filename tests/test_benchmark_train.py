"""What benchmarks/train.py counts and writes, on its tiny shape. Nothing here depends on how long a run takes."""

import contextlib
import io
import json
import subprocess

import pytest
import torch
import train


T, N, K = 24, 3, 4
ARGUMENTS = "--shape tiny --num_tokens 24 --num_points 3 --num_candidates 4 --turns 1 --threads 1".split()
PREFIXES = (6, 14, 23)
ROW = {"name", "scope", "dtype", "seconds_per_group", "cpu_seconds_per_group", "tokens_per_group", "mean_prefix"}
ROW |= {"peak_bytes", "model_bytes", "speedup_over_naive", "speedup_range", "cpu_speedup_over_naive"}
ROW |= {"memory_over_naive", "turns"}


def measure_here(argv, variant):
    """As `measure_alone`, without the seconds that a process takes to start."""
    return train.measure_one(train.parse_arguments(argv), variant)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `main` wrote and printed for the tiny shape."""
    file, printed = tmp_path_factory.mktemp("benchmarks") / "new" / "train.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "measure_alone", measure_here)
        train.main([*ARGUMENTS, "--json", str(file)])
    return json.loads(file.read_text()) | {"printed": printed.getvalue(), "folder": file.parent}


@pytest.fixture
def trainer(tmp_path):
    """Of scope "sequence", with a random adapter that drops nothing, so that it matters what sees it."""
    trainer = train.make_trainer(train.parse_arguments(ARGUMENTS), "sequence", str(tmp_path))
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.05)
    trainer.model.eval()
    return trainer


def test_points_reach_from_the_prompt_to_the_last_token():
    assert train.spread_points(T, N) == list(PREFIXES)
    points = train.spread_points(512, 20)
    assert (points[0], points[-1], len(set(points))) == (128, 511, 20)


@pytest.mark.parametrize("num_points, num_groups", [(20, 4), (20, 2), (20, 20), (12, 2), (9, 3), (9, 4), (2, 1)])
def test_the_groups_of_naive_stand_for_all(num_points, num_groups):
    chosen = train.choose_groups(num_points, num_groups)
    assert len(set(chosen)) == num_groups and chosen == sorted(chosen)
    off = 0 if num_groups % 2 == 0 or num_points % 2 else 0.5
    assert sum(chosen) / num_groups == (num_points - 1) / 2 + off / num_groups
    prefixes = train.spread_points(512, num_points)
    if not off:
        assert sum(prefixes[i] for i in chosen) / num_groups == pytest.approx(sum(prefixes) / num_points, abs=0.5)


def test_rows_and_meta_have_what_readers_of_the_file_expect(run):
    ways = [("naive", "sequence"), ("packed", "candidate"), ("packed", "sequence")]
    assert [(row["name"], row["scope"]) for row in run["rows"]] == ways
    for row in run["rows"]:
        assert set(row) == ROW and (row["dtype"], row["turns"]) == ("float32", 1)
        assert row["seconds_per_group"] > 0 and row["cpu_seconds_per_group"] > 0
        assert row["peak_bytes"] >= 0 and row["memory_over_naive"] >= 0
        low, high = row["speedup_range"]
        assert 0 < low <= row["speedup_over_naive"] <= high
        assert row["mean_prefix"] == pytest.approx(sum(PREFIXES) / N, abs=1e-4)  # the same decision points
    assert run["rows"][0]["speedup_over_naive"] == 1 and len({row["model_bytes"] for row in run["rows"]}) == 1
    meta = run["meta"]
    assert {"threads", "device", "torch", "transformers", "peft", "settings"} <= set(meta)
    assert [meta[name] for name in ("shape", "layers", "vocab")] == ["tiny", 4, 1000]
    assert [meta[name] for name in ("num_tokens", "num_points", "num_candidates")] == [T, N, K]
    assert str(run["folder"]) not in json.dumps(meta)


def test_the_table_has_a_line_for_each_way(run):
    lines = run["printed"].splitlines()
    labels = ("naive", "packed candidate", "packed sequence")
    assert all(sum(line.startswith(f"{label}  ") for line in lines) == 1 for label in labels)
    assert "the published procedure at 3 points, its KL on one of the K rows" in run["printed"]


def test_tokens_are_counted_where_they_run(run):
    naive, candidate, sequence = (row["tokens_per_group"] for row in run["rows"])
    assert naive == pytest.approx(sum(K * (p + 1) + p for p in PREFIXES) / N, abs=1e-3)  # + p: the frozen copy's
    assert candidate == pytest.approx((T + N * K) / N)  # the prefix on the base model, and all candidates
    assert sequence == pytest.approx((T + N * K + T) / N)  # + T: the base model's pass for the KL


@pytest.mark.parametrize(
    "flags, variant, expected",
    [
        (["--naive_kl", "all"], train.NAIVE, sum(2 * K * (p + 1) for p in PREFIXES) / N),
        (["--naive_groups", "1", "--naive_groups_per_step", "1"], train.NAIVE, K * 15 + 14),
        (["--batch_size", "2", "--packed_steps", "1"], train.Variant("packed", "candidate"), (T + N * K) / N),
        (["--dtype", "bfloat16"], train.Variant("packed", "sequence"), (T + N * K + T) / N),
    ],
)
def test_settings_change_what_runs(flags, variant, expected):
    assert measure_here([*ARGUMENTS, *flags], variant)["tokens_per_group"] == pytest.approx(expected)


def test_both_ways_have_the_same_loss(trainer):
    """The mean cross-entropy over the same points; the KL is averaged over other tokens, so it is left out."""
    trainer.args.prefix_kl_weight = 0.0
    args = train.parse_arguments(ARGUMENTS)
    packed, naive = train.Packed(args, trainer), train.Naive(args, trainer)
    ours = trainer.compute_loss(trainer.model, packed.batch)
    theirs = sum(naive.loss(group) for group in range(N)) / N
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert abs(ours.item() - torch.log(torch.tensor(float(K))).item()) > 1e-3  # more than a guess


def test_the_prefix_kl_of_one_row_is_that_of_all(trainer):
    values = []
    for flags in (["--naive_kl", "one"], ["--naive_kl", "all"]):
        naive = train.Naive(train.parse_arguments([*ARGUMENTS, *flags]), trainer)
        values.append(naive.loss(1).item())
    trainer.args.prefix_kl_weight = 0.0
    assert values[0] == pytest.approx(values[1], abs=1e-5) and values[0] > naive.loss(1).item() + 1e-3


@pytest.mark.parametrize("way", train.WAYS.values())
def test_a_run_trains_the_adapter_and_nothing_else(trainer, way):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    way(train.parse_arguments(ARGUMENTS), trainer).run()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed) and any("trainable_tokens_delta" in name for name in changed)
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed), changed


def test_a_variant_is_measured_in_a_process_of_its_own():
    figures = train.measure_alone(ARGUMENTS, train.Variant("packed", "candidate"))
    assert figures["tokens_per_group"] == (T + N * K) / N and figures["mean_prefix"] == pytest.approx(43 / 3)
    assert figures["peak_bytes"] > 0 and figures["model_bytes"] > 4 * 64 * 1000


def test_a_process_that_fails_is_one_line(monkeypatch, capsys):
    killed = subprocess.CompletedProcess([], returncode=-9, stdout="", stderr="a warning\nout of memory\n")
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(SystemExit) as error:
        train.main(ARGUMENTS)
    assert error.value.code == "train.py: naive ended with status -9: out of memory"


def test_quick_is_a_preset_that_flags_win_over():
    args = train.parse_arguments(["--quick", "--num_layers", "2"])
    assert (args.shape, args.vocab_size, args.turns, args.num_layers) == ("small", 8192, 1, 2)
    assert (args.num_tokens, args.num_points, args.num_candidates) == (512, 20, 16)


BAD = {
    "--num_tokens 7": "--num_tokens must be at least 8",
    "--num_points 1": "--num_points must be at least 2",
    "--num_tokens 16 --num_points 13": "--num_points must be at most 12",
    "--num_candidates 65": "--num_candidates must be at most 64",
    "--vocab_size 34": "--vocab_size must be at least 35",
    "--naive_groups_per_step 0": "--naive_groups_per_step must be at least 1",
    "--turns 0": "--turns must be at least 1",
    "--scopes prompt": "invalid choice",
    "--shape huge": "invalid choice",
    "--device cuda": "no CUDA device",
    "--json .": "must name a file",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_is_one_line_before_anything_is_built(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "measure_alone", lambda *args: pytest.fail("started"))
    with pytest.raises(SystemExit) as error:
        train.main(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert said.startswith("train.py: ") and message in said
