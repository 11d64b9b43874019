"""From labels to a calibrated selector through the recipe scripts, on tiny random models and a folder of their own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import RESERVED, prompts, tiny_model
from tiny_labels import tiny_tokenizer

from transformers_s2t import LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, s2t_generate
from transformers_s2t.trajectories import read_labels


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a labelled pair and a trained, calibrated adapter, made by the scripts' own `main`."""
    folder = tmp_path_factory.mktemp("recipes")
    sys.path.insert(0, str(RECIPES))
    try:
        import agreement
        import calibrate
        import label
        import train
    finally:
        sys.path.remove(str(RECIPES))
    for name, seed in (("student", 0), ("teacher", 9)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 40), ("held-out", 25)):
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


def test_a_trained_folder_is_not_trained_again_unless_asked(run, capsys):
    weights = run["folder"] / "adapter" / "adapter_model.safetensors"
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
            str(folder / "labels" / "held-out"),
            "--train_labels",
            str(folder / "labels" / "train"),
            *arguments,
        ]
    )
    report = json.loads(output.read_text())
    assert list(report["hit_at_k"].values()) == sorted(report["hit_at_k"].values())
    names = set(report["agree_at_1"]["choice"])
    assert {"student first", "second candidate", "random candidate", "token prior", "s2t-local"} <= names
    with pytest.raises(ValueError, match="share 25 problems"):
        same = str(folder / "labels" / "held-out")
        run["agreement"].main(["--labels", same, "--train_labels", same, *arguments])


def test_pushing_uploads_the_calibrated_adapter_without_checkpoints(run, monkeypatch):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id))

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append(("upload", repo_id, folder_path))
            assert "checkpoint-*" in ignore_patterns

    monkeypatch.setattr(run["calibrate"], "HfApi", FakeApi)
    adapter, labels = str(run["folder"] / "adapter"), str(run["folder"] / "labels" / "held-out")
    run["calibrate"].main(["--adapter", adapter, "--labels", labels, "--push_to_hub", "you/selector"])
    assert calls == [("create", "you/selector"), ("upload", "you/selector", adapter)]
