"""From labels to a calibrated selector through the recipe scripts, on tiny random models and a folder of their own."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from tiny import RESERVED, prompts, tiny_model
from tiny_hub import TinyHub
from tiny_labels import tiny_tokenizer
from tiny_processes import launch

from s2t_recipes.evaluation import agreement
from s2t_recipes.labeling import label
from s2t_recipes.training import calibrate, train
from s2t_recipes.training import router as train_router
from transformers_s2t import FusionWeights, LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, s2t_generate
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, SEEN_PROBLEMS_NAME
from transformers_s2t.labels.folder import read_labels, shard_files
from transformers_s2t.labels.seen_problems import read_seen_problems


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a labelled pair and a trained, calibrated adapter, made by the scripts' own `main`."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, seed in (("student", 0), ("teacher", 9)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 40), ("held-out", 25), ("test", 25)):
        lines = []
        for i in range(number):
            words = torch.randint(3, RESERVED[0], (5,), generator=generator).tolist()
            lines.append(json.dumps({"id": f"{part}-{i}", "prompt": " ".join(f"w{id}" for id in words)}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
        label.main(
            ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
            + ["--dataset", str(folder / f"{part}.jsonl"), "--output_dir", str(folder / "labels" / part)]
            + ["--max_new_tokens", "10", "--num_candidates", "8", "--dtype", "float32"]
        )
    arguments = [
        "--model",
        str(folder / "student"),
        "--labels",
        str(folder / "labels" / "train"),
        "--dtype",
        "float32",
    ]
    arguments += ["--eval_labels", str(folder / "labels" / "held-out"), "--output_dir", str(folder / "adapter")]
    arguments += ["--learning_rate", "5e-3", "--num_train_epochs", "1", "--use_cpu", "true", "--save_strategy", "no"]
    train.main(arguments)
    calibrate.main(["--adapter", str(folder / "adapter"), "--labels", str(folder / "labels" / "held-out")])
    modules = {"agreement": agreement, "calibrate": calibrate, "label": label, "train": train}
    modules["train_router"] = train_router
    return {"folder": folder, "arguments": arguments, **modules}


def test_a_calibrated_selector_generates_at_a_target_rate(run):
    model = tiny_model()
    selector = LocalSelector.from_pretrained(run["folder"] / "adapter", model)
    trace = S2TTrace()
    config = S2TDecodingConfig(trigger="margin", target_rate=0.2)
    model.generate(
        **prompts(),
        max_new_tokens=10,
        custom_generate=s2t_generate,
        selector=selector,
        decoding_config=config,
        trace=trace,
    )
    assert any(bool(step["asked_B"].any()) for step in trace.steps)


def test_calibration_stores_every_rate_and_the_fusion(run):
    config = SelectorConfig.from_pretrained(run["folder"] / "adapter")
    assert set(config.thresholds) == {"kl", "entropy", "margin"}
    for by_rate in config.thresholds.values():
        values = [by_rate[rate] for rate in sorted(by_rate)]
        assert values == sorted(values, reverse=True)
    assert config.fusion is not None and config.fusion.logprob != 0


def test_a_calibrated_copy_is_what_calibrating_in_place_gives(run, tmp_path):
    """Also of a source that is calibrated already, with thresholds and ids of its own."""
    labels, options = str(run["folder"] / "labels" / "held-out"), ["--target_rates", "0.3", "--deployed", "false"]
    source, place, copy = (tmp_path / name for name in ("source", "place", "copy"))
    for folder in (source, place):
        shutil.copytree(run["folder"] / "adapter", folder)
        (folder / "checkpoint-5").mkdir()
    before = contents(source)
    run["calibrate"].main(["--adapter", str(place), "--labels", labels, *options])
    run["calibrate"].main(["--adapter", str(source), "--labels", labels, "--output_dir", str(copy), *options])
    found, expected = contents(copy), contents(place)
    found.pop(CALIBRATION_NAME), expected.pop(CALIBRATION_NAME)  # holds the command
    assert found == expected and contents(source) == before and not (copy / "checkpoint-5").exists()
    assert set(SelectorConfig.from_pretrained(copy).thresholds["margin"]) == {0.3}
    LocalSelector.from_pretrained(copy, tiny_model())


@pytest.fixture(scope="module")
def routed(run):
    """The adapter with a router that learned from its training labels, calibrated on other ones."""
    adapter, labels = run["folder"] / "routed", run["folder"] / "labels"
    shutil.copytree(run["folder"] / "adapter", adapter)
    run["train_router"].main(["--adapter", str(adapter), "--labels", str(labels / "train"), "--target", "differs"])
    uncalibrated = SelectorConfig.from_pretrained(adapter)
    run["calibrate"].main(
        ["--adapter", str(adapter), "--labels", str(labels / "held-out"), "--target_rates", "0.1", "0.3"]
    )
    return adapter, uncalibrated


def test_a_router_is_trained_calibrated_and_found_beside_its_adapter(run, routed):
    adapter, uncalibrated = routed
    assert uncalibrated.router and "router" not in uncalibrated.thresholds and uncalibrated.fusion is not None
    config = SelectorConfig.from_pretrained(adapter)
    assert config.router == uncalibrated.router and set(config.thresholds["router"]) == {0.1, 0.3}
    assert config.fusion.router != 0
    seen = read_seen_problems(adapter)
    assert seen["router"] == seen["training"]  # all of the train labels: a part of them was held out for the layer
    report = json.loads((adapter / CALIBRATION_NAME).read_text())
    assert not report["router_cross_fitted"] and report["problems"]["checked"] > 0
    for by_rate in (report["rates"][trigger] for trigger in ("entropy", "margin", "router")):
        for entry in by_rate.values():
            low, high = entry["interval"]
            assert low <= entry["achieved"] <= high
    card = (adapter / "README.md").read_text()
    assert card.count("## Calibration") == 1 and "## Figures" in card and "| router | 30.0% |" in card
    model, trace = tiny_model(), S2TTrace()
    selector = LocalSelector.from_pretrained(adapter, model)
    settings = S2TDecodingConfig(trigger="router", target_rate=0.3)
    model.generate(
        **prompts(), max_new_tokens=10, custom_generate=s2t_generate, selector=selector, decoding_config=settings,
        trace=trace,
    )  # fmt: skip
    assert any(bool(step["triggered_B"].any()) for step in trace.steps)


def test_a_router_is_not_trained_again_unless_asked_and_then_to_the_same_bytes(run, routed, capsys):
    adapter, _ = routed
    weights = (adapter / ROUTER_WEIGHTS_NAME).read_bytes()
    arguments = ["--adapter", str(adapter), "--labels", str(run["folder"] / "labels" / "train"), "--target", "differs"]
    run["train_router"].main(arguments)
    assert "already has a router" in capsys.readouterr().out and (adapter / CALIBRATION_NAME).is_file()
    copy = run["folder"] / "routed-again"
    shutil.copytree(adapter, copy)
    policy = {"trigger": "entropy", "target_rate": 0.3}
    dataclasses.replace(SelectorConfig.from_pretrained(copy), decoding=policy).save_pretrained(copy)
    run["train_router"].main(["--adapter", str(copy), *arguments[2:], "--overwrite", "true"])
    assert (copy / ROUTER_WEIGHTS_NAME).read_bytes() == weights
    config = SelectorConfig.from_pretrained(copy)  # the router had a say in what was calibrated
    assert config.thresholds == {} and config.fusion is None and not (copy / CALIBRATION_NAME).exists()
    told, card = capsys.readouterr().out, (copy / "README.md").read_text()
    assert config.decoding is None and "The stored policy, entropy at 0.3, has no threshold any more: removed" in told
    names = ", ".join(SelectorConfig.from_pretrained(adapter).thresholds)
    assert f"calibrated with the router before: the thresholds of {names} and the fusion weights. Calibrate" in told
    assert "## Calibration" not in card and "## Figures" in card, "the card showed thresholds that are gone"


def test_where_the_router_has_seen_the_problems_its_logits_are_cross_fitted(run, capsys):
    adapter, labels = run["folder"] / "short", str(run["folder"] / "labels" / "held-out")
    shutil.copytree(run["folder"] / "adapter", adapter)
    run["train_router"].main(["--adapter", str(adapter), "--labels", labels, "--target", "differs"])
    run["calibrate"].main(["--adapter", str(adapter), "--labels", labels, "--deployed", "false"])
    assert "cross-fitted" in capsys.readouterr().out
    assert json.loads((adapter / CALIBRATION_NAME).read_text())["router_cross_fitted"]
    assert set(SelectorConfig.from_pretrained(adapter).thresholds) == {"entropy", "margin", "router", "kl"}


def test_an_adapted_model_is_calibrated_on_the_text_that_it_writes(run, capsys):
    """Labels hold the base model's text and candidates: thresholds come from decoding, fusion stays the paper's."""
    adapter = run["folder"] / "adapted"
    options = ["--adapter_scope", "sequence", "--proposals", "adapted", "--overwrite", "true", "--max_steps", "2"]
    run["train"].main([*run["arguments"], *options, "--output_dir", str(adapter)])
    labels = ["--labels", str(run["folder"] / "labels" / "held-out")]
    run["calibrate"].main(["--adapter", str(adapter), *labels, "--target_rates", "0.2"])
    config = SelectorConfig.from_pretrained(adapter)
    assert set(config.thresholds) == {"entropy", "margin"} and config.fusion is None
    assert "fusion stays the paper's rule" in capsys.readouterr().out
    for extra in (["--deployed", "false"], ["--triggers", "kl"]):
        with pytest.raises(ValueError, match="`triggers` can be .* here"):
            run["calibrate"].main(["--adapter", str(adapter), *labels, *extra])
    with pytest.raises(ValueError, match="a router cannot be trained on them"):
        run["train_router"].main(["--adapter", str(adapter), *labels])


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("calibrate", ["--triggers", "margins"], "`triggers` must be among 'entropy', 'margin', 'router', 'kl', got"),
        ("calibrate", ["--triggers", "router"], "has no router; `s2t route` trains one"),
        ("calibrate", ["--target_rates", "0"], r"`target_rates` must be in \(0, 1\], got \[0.0\]"),
        ("calibrate", ["--check_share", "1"], r"`check_share` must be in \[0, 1\), got 1.0"),
        ("calibrate", ["--limit", "0"], "`limit` must be at least 1, got 0"),
        ("train_router", ["--target", "wins"], "`target` must be one of 'gain', 'differs', 'kl', got 'wins'"),
        ("train_router", ["--layers", "0", "2"], r"`layers` must be in \[1, 2\], the model's layers, got 0"),
        ("train_router", ["--min_gain", "-1"], "`min_gain` must be at least 0.0, got -1"),
        ("train_router", ["--learning_rate", "0"], "`learning_rate` must be above 0, got 0"),
        ("train_router", ["--min_gain", "5000"], "0 of them positive: a router needs both kinds"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(run, recipe, arguments, message):
    adapter = run["folder"] / "adapter"
    before = {file: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    labels = str(run["folder"] / "labels" / "held-out")
    with pytest.raises(ValueError, match=message):
        run[recipe].main(["--adapter", str(adapter), "--labels", labels, *arguments])
    assert {file: file.read_bytes() for file in adapter.iterdir() if file.is_file()} == before


def test_a_router_whose_two_sets_share_problems_is_refused(run):
    labels = str(run["folder"] / "labels" / "held-out")
    with pytest.raises(ValueError, match="`labels` and `eval_labels` share 25 problems"):
        run["train_router"].main(
            ["--adapter", str(run["folder"] / "adapter"), "--labels", labels, "--eval_labels", labels]
        )


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def other_seed(run):
    """An adapter of the same model and labels as `routed`, with other weights and without a router; calibrated."""
    adapter = run["folder"] / "other-seed"
    options = ["--seed", "1", "--max_steps", "1", "--output_dir", str(adapter)]
    run["train"].main([*run["arguments"], *options])
    run["calibrate"].main(
        ["--adapter", str(adapter), "--labels", str(run["folder"] / "labels" / "held-out"), "--deployed", "false"]
    )
    return adapter


ROUTER_THRESHOLDS = {"margin": {0.1: -1.0}, "router": {0.1: 0.5}}


@pytest.mark.parametrize(
    ("calibrated", "kept"),
    [
        ({}, {"entropy", "margin", "kl"}),
        ({"router": "0" * 16, "thresholds": ROUTER_THRESHOLDS, "fusion": FusionWeights(1.0, 0.5)}, {"margin"}),
        ({"router": "0" * 16, "thresholds": ROUTER_THRESHOLDS, "fusion": FusionWeights(1.0, 0.5, 0.0, 0.1)}, set()),
    ],
)
def test_a_router_that_is_taken_leaves_the_files_that_training_it_leaves(
    run, routed, other_seed, tmp_path, monkeypatch, capsys, calibrated, kept
):
    """Behind a calibration without a router, with another router that had no say in the fused score, and with one."""
    source, ways = routed[0], {name: tmp_path / name for name in ("trained", "taken")}
    for adapter in ways.values():
        shutil.copytree(other_seed, adapter)
        before = dataclasses.replace(SelectorConfig.from_pretrained(adapter), **calibrated)
        before.save_pretrained(adapter)
        assert before.fusion is not None and (adapter / CALIBRATION_NAME).is_file()
        assert contents(adapter)["s2t/adapter_model.safetensors"] != contents(source)["s2t/adapter_model.safetensors"]
    unchanged = contents(source)
    options = ["--labels", str(run["folder"] / "labels" / "train"), "--target", "differs", "--overwrite", "true"]
    run["train_router"].main(["--adapter", str(ways["trained"]), *options])

    def refuse(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run["train_router"], "load_model", refuse)
    capsys.readouterr()
    run["train_router"].main(
        ["--adapter", str(ways["taken"]), "--router_of", str(source), "--overwrite", str(bool(calibrated)).lower()]
    )
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and f"taken from {source}: router {routed[1].router} (target 'differs'" in told
    assert contents(ways["taken"]) == contents(ways["trained"]) and contents(source) == unchanged
    config = SelectorConfig.from_pretrained(ways["taken"])
    assert config.router == routed[1].router and set(config.thresholds) == kept
    assert config.fusion == (before.fusion if kept else None)
    assert read_seen_problems(ways["taken"])["router"] == read_seen_problems(source)["router"]
    assert not (ways["taken"] / CALIBRATION_NAME).exists()
    LocalSelector.from_pretrained(ways["taken"], tiny_model())


def test_a_taken_router_replaces_none_unless_asked_and_is_taken_where_the_model_is_not_named(
    run, routed, other_seed, tmp_path, capsys
):
    adapter = tmp_path / "adapter"
    shutil.copytree(other_seed, adapter)
    config = dataclasses.replace(SelectorConfig.from_pretrained(adapter), router="0" * 16, model_hash="")
    config.save_pretrained(adapter)
    (adapter / ROUTER_WEIGHTS_NAME).write_bytes(b"another")
    before, arguments = contents(adapter), ["--adapter", str(adapter), "--router_of", str(routed[0])]
    run["train_router"].main(arguments)
    assert "already has a router" in capsys.readouterr().out and contents(adapter) == before
    run["train_router"].main([*arguments, "--overwrite", "true"])
    expected = contents(adapter)
    assert SelectorConfig.from_pretrained(adapter).router == routed[1].router
    (adapter / ROUTER_WEIGHTS_NAME).unlink()  # the config still names it, but nobody has it
    run["train_router"].main(arguments)
    assert contents(adapter) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_hash": "beef"}, "has a router for model_hash='[0-9a-f-]+', but .* has model_hash='beef' and would"),
        ({"min_prob_ratio": 0.25}, r"min_prob_ratio=0\.05, but .* has min_prob_ratio=0\.25 "),
        ({"warmup_tokens": 5}, "warmup_tokens=3, but .* has warmup_tokens=5 "),
        ({"reserved_token_ids": (1, 2)}, r"reserved_token_ids=\(\d+, .* has reserved_token_ids=\(1, 2\) "),
        ({"adapter_scope": "sequence", "proposals": "adapted"}, "a router cannot be trained on them"),
    ],
)
def test_the_router_of_an_adapter_that_would_get_another_one_is_not_taken(
    run, routed, other_seed, tmp_path, changed, message
):
    adapter = tmp_path / "adapter"
    shutil.copytree(other_seed, adapter)
    dataclasses.replace(SelectorConfig.from_pretrained(adapter), **changed).save_pretrained(adapter)
    before = contents(adapter)
    with pytest.raises(ValueError, match=message):
        run["train_router"].main(["--adapter", str(adapter), "--router_of", str(routed[0])])
    assert contents(adapter) == before


SPOILT_ROUTERS = {
    "no folder": (shutil.rmtree, "`router_of` must be the local folder of an adapter with a router, got"),
    "none": (
        lambda folder: dataclasses.replace(SelectorConfig.from_pretrained(folder), router="").save_pretrained(folder),
        "`router_of`: .* has no router",
    ),
    "no file": (lambda folder: (folder / ROUTER_WEIGHTS_NAME).unlink(), "`router_of`: .* is not the router that"),
    "another file": (
        lambda folder: (folder / ROUTER_WEIGHTS_NAME).write_bytes(b"other"),
        "`router_of`: .* is not the router that",
    ),
    "unknown problems": (
        lambda folder: (folder / SEEN_PROBLEMS_NAME).unlink(),
        "`router_of`: .* does not tell which problems its router has seen",
    ),
}


@pytest.mark.parametrize("spoil", SPOILT_ROUTERS)
def test_a_router_that_is_not_there_or_not_known_is_not_taken(run, routed, other_seed, tmp_path, spoil):
    source, before = tmp_path / "source", contents(other_seed)
    shutil.copytree(routed[0], source)
    change, message = SPOILT_ROUTERS[spoil]
    change(source)
    with pytest.raises(ValueError, match=message):
        run["train_router"].main(["--adapter", str(other_seed), "--router_of", str(source)])
    assert contents(other_seed) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "One of `labels` and `router_of` must be given, and only one, got labels=None and router_of=None"),
        (["--labels", "a", "--router_of", "b"], "and only one, got labels='a' and router_of='b'"),
        (["--router_of", "b", "--eval_labels", "c"], "`eval_labels` must be left out with `router_of`, .* got 'c'"),
    ],
)
def test_a_router_is_either_trained_or_taken(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run["train_router"].main(["--adapter", str(run["folder"] / "adapter"), *arguments])


def test_a_second_round_is_written_by_the_trained_selector(run, capsys):
    """Labels where the deployed selector goes: corrected by the teacher, or by itself."""
    folder = run["folder"]
    options = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--dtype", "float32"]
    options += ["--dataset", str(folder / "held-out.jsonl"), "--max_new_tokens", "10", "--num_candidates", "8"]
    texts = {}
    for policy in ("greedy", "s2t", "s2t-local"):
        extra = ["--adapter", str(folder / "adapter")] if policy == "s2t-local" else []
        output = str(folder / "rounds" / policy)
        run["label"].main([*options, "--rollout_policy", policy, "--output_dir", output, *extra])
        labels, header = read_labels(output)
        texts[policy] = labels["input_ids"]
        assert header.rollout == policy and bool(header.decoding) == (policy != "greedy")
        assert ("adapter" in header.decoding) == (policy == "s2t-local")
    assert texts["greedy"] != texts["s2t"] != texts["s2t-local"] != texts["greedy"]
    for bad, message in (
        (["--rollout_policy", "s2t-local"], "`adapter` must be given with rollout_policy='s2t-local'"),
        (["--adapter", str(folder / "adapter")], "`adapter` must be given"),
        (["--rollout_policy", "teacher"], "`rollout` must be one of"),
        (["--rollout_policy", "s2t-local", "--adapter", str(folder)], "`adapter` must be the folder of a trained"),
    ):
        with pytest.raises(SystemExit) as error:
            run["label"].main([*options, "--output_dir", str(folder / "rounds" / "bad"), *bad])
        assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (folder / "rounds" / "bad").exists()


def test_two_processes_write_the_labels_of_one(run, capfd):
    """Each takes every second shard; the threshold comes from what both saw. One process made the labels of `run`."""
    folder = run["folder"]
    arguments = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--dtype", "float32"]
    arguments += ["--dataset", str(folder / "train.jsonl"), "--max_new_tokens", "10", "--num_candidates", "8"]
    arguments += ["--shard_size", "7", "--output_dir", str(folder / "two")]
    config = RECIPES / "accelerate_configs" / "cpu.yaml"
    launch(["--config_file", config, "--num_processes", "2"], run["label"].main, arguments)
    assert capfd.readouterr().out.count("trajectories") == 1
    (one, header), (two, other) = read_labels(folder / "labels" / "train"), read_labels(folder / "two")
    assert header == other and header.complete and len(shard_files(folder / "two")) == 6
    assert one["problem_id"] == two["problem_id"]
    for column in ("input_ids", "positions", "candidate_ids", "teacher_top_id"):
        assert one[column] == two[column], column
    for left, right in zip(one["teacher_logprobs"], two["teacher_logprobs"]):
        assert torch.allclose(torch.tensor(left), torch.tensor(right), atol=1e-4)


def test_labels_have_a_card_with_figures_and_a_picture_and_go_to_the_hub(run, monkeypatch):
    folder, calls = run["folder"] / "labels" / "held-out", []
    hub = SimpleNamespace(
        create_repo=lambda **kwargs: calls.append(kwargs),
        upload_folder=lambda **kwargs: calls.append(kwargs),
        upload_file=lambda **kwargs: calls.append(kwargs),
    )
    monkeypatch.setattr(run["label"], "HfApi", lambda: hub)
    arguments = ["--model", str(run["folder"] / "student"), "--teacher_model", str(run["folder"] / "teacher")]
    arguments += ["--dataset", str(run["folder"] / "held-out.jsonl"), "--output_dir", str(folder)]
    arguments += ["--max_new_tokens", "10", "--num_candidates", "8", "--dtype", "float32"]
    run["label"].main([*arguments, "--push_to_hub", "you/labels", "--private", "true", "--license", "mit"])  # finished
    repo = {"repo_id": "you/labels", "repo_type": "dataset"}
    assert calls[0] == repo | {"private": True, "exist_ok": True}
    assert calls[1] == repo | {"folder_path": str(folder), "ignore_patterns": ["s2t_labels.json", ".*"]}
    pushed = json.loads(calls[2]["path_or_fileobj"])
    assert str(run["folder"]) not in str(pushed) and str(run["folder"]) in (folder / "s2t_labels.json").read_text()
    assert pushed["model"] == "student" and pushed["prompt_source"]["dataset"] == "held-out.jsonl"
    assert (
        "license: mit" in (folder / "README.md").read_text()
        and "- text-generation" in (folder / "README.md").read_text()
    )
    card, stats = (folder / "README.md").read_text(), json.loads((folder / "label_stats.json").read_text())
    for value in stats["hit_at_k"].values():
        assert f"{value:.3f}" in card
    assert "divergence.png" in card and (folder / "divergence.png").stat().st_size > 5000
    assert str(run["folder"]) not in card
    assert len(load_dataset(str(folder), split="train", cache_dir=str(run["folder"] / "cache"))) == 25


def test_one_folder_of_labels_holds_what_is_trained_on_and_what_is_held_out(run, capsys):
    """Labeled once; training evaluates on the held-out problems, and evaluation refuses both parts."""
    folder, labels = run["folder"], str(run["folder"] / "labels" / "divided")
    arguments = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--dtype", "float32"]
    arguments += ["--dataset", str(folder / "train.jsonl"), "--max_new_tokens", "10", "--num_candidates", "8"]
    arguments += ["--rollout_policy", "sample", "--num_rollouts", "2", "--validation_share", "0.25"]
    run["label"].main([*arguments, "--output_dir", labels, "--dry_run", "true"])
    assert not Path(labels).exists() and "left to do: 40 problems" in capsys.readouterr().out
    run["label"].main([*arguments, "--output_dir", labels])
    assert "80 trajectories (train: " in capsys.readouterr().out
    card = (Path(labels) / "README.md").read_text()
    assert "path: train-*.parquet" in card and "path: validation-*.parquet" in card
    sizes = {split: len(read_labels(labels, split)[0]) for split in ("train", "validation")}
    assert sum(sizes.values()) == 80 and sizes["validation"] > 0
    trained = ["--model", str(folder / "student"), "--labels", labels, "--dtype", "float32", "--use_cpu", "true"]
    trained += ["--output_dir", str(folder / "divided"), "--max_steps", "1", "--save_strategy", "no"]
    run["train"].main(trained)
    state = json.loads((folder / "divided" / "trainer_state.json").read_text())
    assert any("eval_agree_at_1" in entry for entry in state["log_history"])
    run["calibrate"].main(["--adapter", str(folder / "divided"), "--labels", labels])
    assert f" decision points with a choice, of {sizes['validation']} trajectories" in capsys.readouterr().out


def test_what_is_deployed_is_what_a_call_does_that_says_nothing(run, routed, tmp_path, capsys):
    adapter, labels = tmp_path / "adapter", str(run["folder"] / "labels" / "held-out")
    shutil.copytree(routed[0], adapter)
    arguments = ["--adapter", str(adapter), "--labels", labels, "--check_share", "0", "--triggers", "margin"]
    run["calibrate"].main([*arguments, "--target_rates", "0.3", "--deploy", "margin:0.3"])
    model = tiny_model()
    selector = LocalSelector.from_pretrained(adapter, model)
    assert (selector.config.trigger, selector.config.target_rate) == ("margin", 0.3)
    asked, silent = (
        model.generate(**prompts(), max_new_tokens=10, custom_generate=s2t_generate, selector=selector, **config)
        for config in ({"decoding_config": {"trigger": "margin", "target_rate": 0.3}}, {})
    )
    assert torch.equal(asked, silent)
    run["calibrate"].main([*arguments, "--target_rates", "0.3"])
    assert SelectorConfig.from_pretrained(adapter).decoding.trigger == "margin", "calibrated again, it stays"
    run["calibrate"].main([*arguments, "--target_rates", "0.2"])
    assert SelectorConfig.from_pretrained(adapter).decoding is None and "removed" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["margin:0.4", "margin", "kl:0.1", "entropy:0.1", "magin:0.1", "margin:x"])
def test_a_policy_that_cannot_be_deployed_is_refused_before_the_work(run, policy):
    arguments = ["--adapter", str(run["folder"] / "adapter"), "--labels", "nowhere", "--triggers", "margin"]
    with pytest.raises(ValueError, match="`deploy` must be always"):
        run["calibrate"].main([*arguments, "--target_rates", "0.1", "--deploy", policy])


def test_a_trained_folder_is_not_trained_again_unless_asked(run, capsys):
    weights = run["folder"] / "adapter" / "s2t" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    run["train"].main(run["arguments"])
    assert "already holds" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before


def test_agreement_reports_the_controls_and_refuses_shared_problems(run, tmp_path):
    folder = run["folder"]
    output = tmp_path / "agreement.json"
    arguments = ["--adapters", str(folder / "adapter"), "--output", str(output)]
    run["agreement"].main(
        [
            "--labels",
            str(folder / "labels" / "test"),
            "--train_labels",
            str(folder / "labels" / "train"),
            *arguments,
        ]
    )
    report = json.loads(output.read_text())
    assert list(report["hit_at_k"].values()) == sorted(report["hit_at_k"].values())
    names = set(report["agree_at_1"]["choice"])
    assert {"student first", "second candidate", "random candidate", "token prior", "s2t-local"} <= names
    assert -1 <= report["agree_at_1"]["choice"]["s2t-local, fused"]["spearman"] <= 1
    assert set(report["meta"]) >= {"points", "kl_points", "choice_points"}
    with pytest.raises(ValueError, match="share 25 problems"):
        same = str(folder / "labels" / "test")
        run["agreement"].main(["--labels", same, "--train_labels", same, *arguments])


def test_pushing_uploads_the_calibrated_adapter_and_nothing_else(run, monkeypatch):
    """A checkpoint and the arguments of a training, which may hold a token, stay here."""
    adapter, labels = run["folder"] / "adapter", str(run["folder"] / "labels" / "held-out")
    (adapter / "checkpoint-9").mkdir(exist_ok=True)
    (adapter / "checkpoint-9" / "s2t_config.json").write_text("{}")
    assert (adapter / "training_args.bin").is_file()
    with TinyHub(monkeypatch) as hub:
        run["calibrate"].main(["--adapter", str(adapter), "--labels", labels, "--push_to_hub", "you/selector"])
    pushed = hub.files("you/selector")
    assert {"s2t/adapter_model.safetensors", "s2t_config.json", "seen_problems.json", "README.md"} <= pushed.keys()
    assert not [name for name in pushed if "checkpoint" in name or "training_args" in name]
    assert pushed["s2t_config.json"] == (adapter / "s2t_config.json").read_bytes()
