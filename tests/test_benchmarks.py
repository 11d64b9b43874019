"""What benchmarks/decode.py counts and writes, on its tiny shape. Nothing here depends on how long a run takes."""

import contextlib
import io
import json

import decode
import pytest
import torch
from tiny import make_selector, prompts, tiny_model

from transformers_s2t import S2TDecodingConfig, S2TTrace, s2t_generate


NEW_TOKENS, RATES, BATCHES = 20, (0.1, 0.25), (1, 2)
ARGUMENTS = "--shape tiny --new_tokens 20 --rates 0.1 0.25 --batch_sizes 1 2 --prefix_lengths 9 --turns 1".split()
ROW = {"name", "scope", "proposals", "rate", "batch", "prefix", "dtype", "ratio", "ratio_range", "cpu_ratio"}
ROW |= {"forwards_per_token", "asked_rate", "turns"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `main` wrote and printed for the tiny shape, with everything but naive at batch 2."""
    folder, printed = tmp_path_factory.mktemp("benchmarks"), io.StringIO()
    files = {"json": folder / "new" / "decode.json", "plot": folder / "decode.png"}
    with contextlib.redirect_stdout(printed):
        decode.main([*ARGUMENTS, "--all_scopes", "--json", str(files["json"]), "--plot", str(files["plot"])])
    return json.loads(files["json"].read_text()) | {"printed": printed.getvalue(), "plot": files["plot"]}


def select(run, **wanted):
    return [row for row in run["rows"] if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("rate, new_tokens, batch_size", [(0.01, 100, 1), (0.1, 40, 3), (0.05, 100, 8), (1.0, 10, 2)])
def test_the_first_seed_that_fires_exactly_at_the_rate_is_taken(rate, new_tokens, batch_size):
    def count(seed):
        generator, fired = torch.Generator().manual_seed(seed), 0
        for step in range(new_tokens):
            fired += sum(step >= 3 and x >= 1 - rate for x in torch.rand(batch_size, generator=generator).tolist())
        return fired

    wanted = 14 if rate == 1.0 else round(rate * new_tokens * batch_size)  # 3 of the 10 steps warm up
    seed = decode.find_seed(rate, new_tokens, batch_size)
    assert count(seed) == wanted and all(count(earlier) != wanted for earlier in range(seed))


def test_a_session_asks_as_often_as_the_seed_says():
    inputs, rate = prompts(), 0.2
    seed = decode.find_seed(rate, NEW_TOKENS, len(inputs["input_ids"]))
    config, trace = S2TDecodingConfig(trigger="random", target_rate=rate, min_prob_ratio=0.0, seed=seed), S2TTrace()
    model = tiny_model(eos_token_id=None)
    call = {"custom_generate": s2t_generate, "selector": make_selector(model), "decoding_config": config}
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, trace=trace, **call)
    assert sum(int(step["asked_B"].sum()) for step in trace.steps) == round(rate * NEW_TOKENS * 3)


def test_a_rate_that_no_seed_meets_is_an_error():
    with pytest.raises(ValueError, match="none of 0 seeds triggers exactly 1 of 100 tokens"):
        decode.find_seed(0.01, 100, 1, max_seeds=0)


def test_every_way_asked_for_has_its_row(run):
    scopes = [("candidate", "base"), ("sequence", "base"), ("sequence", "adapted")]
    expected = {(name, None, None, None, batch) for name in ("greedy", "maj8") for batch in BATCHES}
    for rate in RATES:
        ways = [(name, *scope) for name in ("s2t_generate", "processor") for scope in scopes]
        expected |= {(*way, rate, batch) for way in ways for batch in BATCHES}
        expected.add(("naive", "sequence", "base", rate, 1))
    found = [tuple(row[name] for name in ("name", "scope", "proposals", "rate", "batch")) for row in run["rows"]]
    assert set(found) == expected and len(found) == len(expected)


def test_rows_and_meta_have_what_readers_of_the_file_expect(run):
    for row in run["rows"]:
        assert set(row) == ROW and row["prefix"] == 9 and row["dtype"] == "float32" and row["turns"] == 1
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high and row["cpu_ratio"] > 0
        planned = row["rate"] and round(row["rate"] * NEW_TOKENS * row["batch"]) / (NEW_TOKENS * row["batch"])
        assert row["asked_rate"] == planned
    meta = run["meta"]
    assert {"threads", "device", "torch", "transformers", "peft", "settings"} <= set(meta)
    assert (meta["shape"], meta["vocab"], meta["new_tokens"], meta["num_candidates"]) == ("tiny", 1000, NEW_TOKENS, 8)
    assert str(run["plot"].parent) not in json.dumps(meta)
    assert run["plot"].read_bytes().startswith(b"\x89PNG")


def test_forwards_are_counted(run):
    for row in select(run, name="greedy") + select(run, name="maj8"):
        assert row["forwards_per_token"] == 1.0
    for row in select(run, name="naive"):  # a forward of K rows at every trigger
        assert row["forwards_per_token"] == pytest.approx(1 + row["asked_rate"], abs=1e-4)
    assert all(row["forwards_per_token"] >= 1 for row in select(run, name="s2t_generate"))
    assert all(row["forwards_per_token"] > 1 for row in select(run, name="processor"))


def test_the_table_says_what_was_left_out(run):
    assert "naive at batch 2" in run["printed"].splitlines()[-4] and "skipped" in run["printed"]
    args, _ = decode.parse_arguments(["--quick", "--rates", "0.05", "0.2"])
    assert (args.rates, args.turns, args.naive_rates, args.vocab_size) == ([0.05, 0.2], 2, [0.05], 8192)
    assert any(line.startswith("naive at rate 0.2") for line in decode.list_skipped(args))
    assert args.num_layers == 6 and set(args.variants) == {"s2t_generate", "processor", "naive", "maj8"}


def test_models_share_their_weights_and_greedy_has_no_adapter():
    bench = decode.Bench(decode.parse_arguments(ARGUMENTS)[0])
    names = [name for name, _ in bench.plain.named_modules()]
    assert not any("lora" in name for name in names) and len(bench.selectors) == 3
    ours = bench.plain.model.layers[0].mlp.up_proj.weight
    for scope, selector in bench.selectors.items():
        layer = selector.model.model.layers[0].mlp.up_proj
        if scope == "sequence/adapted":  # merged, into weights of its own
            assert type(layer) is torch.nn.Linear and layer.weight is not ours
        else:
            assert layer.base_layer.weight is ours


BAD = {
    "--rates 0": "--rates must be in (0, 1]",
    "--rates 0.001": "less than one step",
    "--prefix_lengths 0": "--prefix_lengths must be at least 1",
    "--new_tokens 3": "--new_tokens must be at least 4",
    "--num_candidates 65": "num_candidates",
    "--shape huge": "invalid choice",
    "--device cuda": "no CUDA device",
    "--plot figure.pdf": "must end in .png",
    "--json .": "must name a file",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_is_one_line_before_anything_is_built(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "Bench", lambda args: pytest.fail("built"))
    with pytest.raises(SystemExit) as error:
        decode.main(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert said.startswith("decode.py: ") and message in said
