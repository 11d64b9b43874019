"""recipes/train_baseline.py and `--tuned` of recipes/eval.py: what S2T-Local has to be compared with."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import EOS, RESERVED, disagreeing_pair, tiny_model
from tiny_labels import tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from s2t_recipes.evaluation.run import EvaluateArguments, evaluate
from s2t_recipes.labeling import label
from s2t_recipes.records import read_records
from s2t_recipes.report import html_report
from s2t_recipes.training import imitate
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.labels.seen_problems import read_seen_problems


NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair, labels of ten problems, and both baselines trained on them."""
    folder = tmp_path_factory.mktemp("baselines")
    for name, model in zip(("student", "teacher"), disagreeing_pair()):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 10), ("test", 6)):
        lines = []
        for _ in range(number):
            words = torch.randint(3, RESERVED[0], (5,), generator=generator).tolist()
            lines.append(json.dumps({"prompt": " ".join(f"w{id}" for id in words), "answer": "w7"}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    pair = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--dtype", "float32"]
    label.main(
        [*pair, "--dataset", str(folder / "train.jsonl"), "--output_dir", str(folder / "labels")]
        + ["--max_new_tokens", str(NEW_TOKENS), "--num_candidates", "8"]
    )
    for method in ("sft", "kd"):
        imitate.main(train(folder, method))
    return folder


def train(folder, method, *options):
    arguments = ["--method", method, "--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    arguments += ["--labels", str(folder / "labels"), "--output_dir", str(folder / method), "--dtype", "float32"]
    arguments += ["--max_steps", "12", "--learning_rate", "1e-2", "--per_device_train_batch_size", "5"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--save_strategy", "no", "--report_to", "none"]
    return [*arguments, *options]


def texts_of(folder, method, **more):
    """What the method trains on, made by the recipe."""
    labels, header = read_labels(str(folder / "labels"))
    module = imitate
    places = {"model": folder / "student", "teacher_model": folder / "teacher", "labels": folder / "labels"}
    args = module.BaselineArguments(
        method=method, **{name: str(place) for name, place in places.items()}, teacher_batch_size=4, **more
    )
    return module.make_texts(args, labels, header, 0), disagreeing_pair()[1], labels


def test_fine_tuning_learns_from_the_teachers_own_greedy_texts(folder):
    texts, teacher, labels = texts_of(folder, "sft")
    assert len(texts) == 10
    for (ids, start), row in zip(texts, labels):
        prompt = row["input_ids"][: row["prompt_length"]]
        expected = teacher.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=EOS,
            suppress_tokens=list(RESERVED),
        )
        assert ids == expected[0].tolist() and start == len(prompt)


def test_fine_tuning_can_learn_from_texts_that_the_teacher_samples(folder, tmp_path):
    texts, _, labels = texts_of(folder, "sft", num_samples=3)
    again, _, _ = texts_of(folder, "sft", num_samples=2)
    greedy, _, _ = texts_of(folder, "sft")
    assert (
        len(texts) == 30 and [texts[3 * n + i] for n in range(10) for i in range(2)] == again
    )  # batches do not matter
    for n, row in enumerate(labels):
        own = texts[3 * n : 3 * n + 3]
        assert all(ids[:start] == row["input_ids"][: row["prompt_length"]] for ids, start in own)
        assert len({tuple(ids) for ids, _ in own} | {tuple(greedy[n][0])}) > 1
    output = tmp_path / "sampled"
    options = ["--output_dir", str(output), "--num_samples", "3", "--attn_implementation", "eager"]
    imitate.main(train(folder, "sft", *options))
    assert json.loads((output / "baseline.json").read_text())["texts"] == 30


def test_the_teacher_writes_once_what_several_trainings_want(folder, tmp_path, monkeypatch):
    module, kept = imitate, {"teacher_texts": str(tmp_path / "texts")}
    written, write_texts = [], module.write_texts
    monkeypatch.setattr(module, "write_texts", lambda *args: written.append(1) or write_texts(*args))
    greedy, sampled = (texts_of(folder, "sft", num_samples=number)[0] for number in (None, 3))
    written.clear()
    for _ in range(2):
        assert texts_of(folder, "sft", **kept)[0] == greedy
        assert texts_of(folder, "sft", num_samples=3, **kept)[0] == sampled
    assert len(written) == 2 and len(list((tmp_path / "texts").iterdir())) == 2
    for name in ("first", "second"):
        options = ["--output_dir", str(tmp_path / name), "--max_problems", "4"]
        module.main(train(folder, "sft", *options, "--teacher_texts", kept["teacher_texts"]))
    assert len(written) == 3  # of other problems
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())


def test_distillation_goes_along_the_students_own_texts(folder):
    texts, _, labels = texts_of(folder, "kd")
    assert texts == list(zip(labels["input_ids"], labels["prompt_length"]))


def mean_kl(model, teacher, texts):
    total = count = 0
    for ids, start in texts:
        logits_TV, teacher_TV = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (model, teacher))
        for t in range(start - 1, len(ids) - 1):  # index t decides the token at t + 1
            total += float((teacher_TV[t].exp() * (teacher_TV[t] - logits_TV[t])).sum())
            count += 1
    return total / count


@torch.no_grad()
def test_the_loss_of_distillation_is_the_mean_divergence_at_generated_tokens(folder, tmp_path, monkeypatch):
    texts, teacher, _ = texts_of(folder, "kd")
    module = imitate
    model = tiny_model()
    width = max(len(ids) for ids, _ in texts)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts]),
        "labels": torch.tensor([[-100] * s + ids[s:] + [-100] * (width - len(ids)) for ids, s in texts]),
    }
    trainer = module.DistillationTrainer.__new__(module.DistillationTrainer)
    trainer.teacher_model, trainer.args = teacher, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    read = []
    hook = lambda module, args, kwargs: read.append(kwargs["input_ids"].numel())  # noqa: E731
    teacher.model.register_forward_pre_hook(hook, with_kwargs=True)
    for trainer.states in ({}, module.keep_states(teacher, texts, batch_size=3)):
        read.clear()
        loss = trainer.compute_loss(model, dict(inputs))
        assert (sum(read) == 0) is bool(trainer.states)  # what is kept is not read again
        assert float(loss) == pytest.approx(mean_kl(model, teacher, texts), rel=1e-4)
        total = float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=1))
        assert total == pytest.approx(float(loss) * int((inputs["labels"][:, 1:] != -100).sum()), rel=1e-4)
        with monkeypatch.context() as two:  # processes, whose gradients are averaged
            two.setattr(type(trainer.args), "world_size", 2)
            assert float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=2)) == pytest.approx(total)
    monkeypatch.setattr(module, "MAX_STATES", 1)
    assert module.keep_states(teacher, texts, batch_size=3) == {}


def test_fine_tuning_has_the_loss_and_gradients_of_trl_with_the_head_on_trained_tokens_only(folder, tmp_path):
    texts, _, _ = texts_of(folder, "sft")
    columns = {"input_ids": [ids for ids, _ in texts], "labels": [[-100] * n + ids[n:] for ids, n in texts]}
    found, heads = [], []
    for trainer_class in (SFTTrainer, imitate.TextTrainer):
        config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)
        settings = {"args": config, "train_dataset": Dataset.from_dict(columns), "processing_class": tiny_tokenizer()}
        trainer = trainer_class(tiny_model(), **settings)
        inputs = next(iter(trainer.get_train_dataloader()))
        trainer.model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(17))
        loss.backward()
        gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
        found.append((float(loss), gradients))
    assert heads and max(heads) < inputs["input_ids"].shape[1] - 1  # prompts are five tokens and more
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sft", "kd"])
def test_training_comes_closer_to_the_teacher_and_says_what_it_has_seen(folder, method):
    texts, teacher, labels = texts_of(folder, method)
    before, after = tiny_model(), PeftModel.from_pretrained(tiny_model(), str(folder / method))
    assert mean_kl(after, teacher, texts) < mean_kl(before, teacher, texts)
    assert read_seen_problems(folder / method)["training"] == set(labels["problem_id"])
    note = json.loads((folder / method / "baseline.json").read_text())
    assert note["method"] == method and note["problems"] == 10
    assert note["trained_tokens"] == sum(len(ids) - start for ids, start in texts)
    assert not any("embed_tokens" in name for name in load_file(folder / method / "adapter_model.safetensors"))


def test_training_on_a_cpu_warns_of_nothing_that_no_user_can_change(folder, tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    imitate.main(train(folder, "sft", "--output_dir", str(tmp_path / "out"), "--max_steps", "1"))
    told = [str(warning.message) for warning in recwarn]
    assert not [text for text in told if "pin_memory" in text or "gradient_checkpointing" in text]
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "safetensors keeps weights from other users"


def test_what_is_trained_is_not_trained_again_unless_asked(folder, capsys):
    imitate.main(train(folder, "sft"))
    assert "already holds a trained adapter" in capsys.readouterr().out


def run_evaluation(folder, output, *policies, **settings):
    settings = {"teacher_model": None, "policies": list(policies) or None, "answer_style": "auto"} | settings
    return evaluate(
        EvaluateArguments(
            model=str(folder / "student"),
            dataset=str(folder / "test.jsonl"),
            output_dir=str(output),
            max_new_tokens=NEW_TOKENS,
            **settings,
        )
    )


def test_tuned_adapters_are_measured_beside_greedy_seed_by_seed(folder, tmp_path):
    tuned = [f"sft={folder / 'sft'}", f"sft={folder / 'kd'}", f"kd={folder / 'kd'}"]
    report = run_evaluation(folder, tmp_path, "greedy", "sft", "kd", tuned=tuned)
    assert [(row["policy"], row["num_seeds"]) for row in report["rows"]] == [("greedy", 1), ("sft", 2), ("kd", 1)]
    files = {file.name for file in (tmp_path / "records").iterdir() if file.suffix == ".jsonl"}
    assert {"greedy.jsonl", "sft_adapter0.jsonl", "sft_adapter1.jsonl", "kd_adapter0.jsonl"} <= files
    assert [len(row["records"]) for row in report["rows"]] == [1, 2, 1]
    runs, notes = html_report.read_runs(tmp_path, report["rows"])
    assert [(run.row["policy"], run.seed) for run in runs] == [("greedy", None), ("sft", 0), ("sft", 1), ("kd", 0)]
    assert notes == []
    read = read_records
    (_, first), (_, second), (_, kd) = (read(tmp_path / "records" / f"{name}.jsonl") for name in
                                        ("sft_adapter0", "sft_adapter1", "kd_adapter0"))  # fmt: skip
    assert [one["text"] for one in second] == [one["text"] for one in kd] != [one["text"] for one in first]
    model = PeftModel.from_pretrained(tiny_model(), str(folder / "kd"))
    tokenizer = tiny_tokenizer()
    line = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS)[
        0, ids.shape[1] :
    ]
    assert kd[0]["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_problems_that_a_tuned_adapter_has_seen_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`dataset` shares 10 of its 10 problems .*in training \(10\)"):
        evaluate(
            EvaluateArguments(
                model=str(folder / "student"),
                dataset=str(folder / "train.jsonl"),
                output_dir=str(tmp_path),
                policies=["kd"],
                tuned=[f"kd={folder / 'kd'}"],
            )
        )


@pytest.mark.parametrize("text", ["kd", "=x", "kd=", "greedy=x", "s2t=x", "maj@8=x", "a:b=x"])
def test_names_of_tuned_adapters_are_checked(folder, tmp_path, text):
    with pytest.raises(ValueError, match="`tuned` must be name=folder with a name that no other policy has, got"):
        run_evaluation(folder, tmp_path, "greedy", tuned=[text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dpo"}, "`method` must be one of 'sft', 'kd', got 'dpo'"),
        ({"lora_r": 0}, "`lora_r` must be at least 1, got 0"),
        ({"teacher_batch_size": 0}, "`teacher_batch_size` must be at least 1, got 0"),
        ({"teacher_texts": "x", "method": "kd"}, "`teacher_texts` is for method='sft', got 'x' with 'kd'"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, and is for method='sft', got 0 with 'sft'"),
        (
            {"num_samples": 4, "method": "kd"},
            "`num_samples` must be at least 1, and is for method='sft', got 4 with 'kd'",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message):
    settings = {"method": "sft", "model": "m", "teacher_model": "t", "labels": "l"} | changes
    with pytest.raises(ValueError, match=message):
        imitate.BaselineArguments(**settings)
