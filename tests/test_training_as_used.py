"""S2TTrainer as people use it: models, adapters, labels and settings in every form that transformers and TRL take."""

import copy
import dataclasses
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from test_s2t_trainer import make_trainer, randomise, spoil, trained
from tiny import PAD, RESERVED, tiny_model
from tiny_hub import TinyHub
from tiny_labels import NUM_CANDIDATES as K
from tiny_labels import make_labels, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainingArguments

from s2t_recipes.training import train
from transformers_s2t import LocalSelector, S2TConfig, SelectorConfig
from transformers_s2t.calibration.scored_points import score_labels
from transformers_s2t.labels.collator import TrajectoryCollator
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.selector_files import ADAPTER_FOLDER


PROMPT = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 20, "do_sample": False}
TWO_STEPS = {"max_steps": 2}


def lora(**config):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config))


def with_rows(names=("default",), **config):
    """A PeftModel whose adapter `names[0]` trains the reserved rows; the others are plain."""
    rows = {"trainable_token_indices": {"lm_head": list(RESERVED)}, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(), lora(**(rows | config)), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(task_type="CAUSAL_LM"))
    model.set_adapter(names[0])
    return model


def folder_of_labels(folder, vocab_hash=None, model_hash=""):
    """A folder as recipes/label.py writes it, with a header where a `vocab_hash` is given."""
    folder.mkdir()
    write_shard(folder, 0, make_labels(seed=1).to_list())
    if vocab_hash is not None:
        header = {"model": "other", "teacher_model": "teacher", "num_candidates": K, "target_rate": 0.1}
        header |= {"vocab_hash": vocab_hash, "model_hash": model_hash, "complete": True}
        write_header(folder, TrajectoryHeader(**header))
    return folder


def assert_scores_survive(trainer, model=None):
    """What `LocalSelector` loads from `output_dir` scores as the trainer does."""
    trainer.save_model()
    trainer.model.eval()
    labels = make_labels().select(range(4))
    rows = labels.to_list()
    with torch.no_grad():
        scores_BNK = trainer._loss(trainer.data_collator(rows))[1]
    selector = LocalSelector.from_pretrained(trainer.args.output_dir, tiny_model() if model is None else model)
    found = score_labels(selector, labels, num_candidates=K, min_prob_ratio=0.0).scores_NK.flatten().sort().values
    ours = torch.cat([scores[: len(row["positions"])] for scores, row in zip(scores_BNK, rows)])
    assert torch.allclose(found, ours.flatten().sort().values, atol=1e-6)


# ---- the model ----


def test_a_model_may_be_a_path_as_its_labels_may(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, model=tmp_path / "model")
    assert Path(trainer.selector_config().base_model) == tmp_path / "model"


def test_a_relative_path_of_the_model_is_stored_whole(tmp_path, monkeypatch):
    """It meant nothing in another working directory."""
    tiny_model().save_pretrained(tmp_path / "some" / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, model="some/model")
    monkeypatch.chdir("/")
    trainer.save_model()
    assert SelectorConfig.from_pretrained(tmp_path / "out").base_model == str(tmp_path / "some" / "model")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and "some/model" not in card


def test_all_saved_files_have_one_mode(tmp_path):
    """safetensors keeps weights from other users."""
    before = os.umask(0o027)
    try:
        make_trainer(tmp_path).save_model()
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert set(modes.values()) == {"0o640"}, modes


def test_a_pad_token_without_a_row_in_the_embedding_is_no_harm(tmp_path):
    """`add_special_tokens({"pad_token": ...})` without resizing: padding is masked, so any row would do."""
    from transformers_s2t import S2TTrainer

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == tiny_model().config.vocab_size
    args = S2TConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, num_candidates=K, disable_tqdm=True)
    S2TTrainer(tiny_model(), args, make_labels(), processing_class=tokenizer).train()


@pytest.mark.parametrize("others", [(), ("other",)])
def test_an_adapter_of_any_name_is_saved_where_it_is_looked_for(tmp_path, others):
    """PEFT saves "default" into the folder and every other name into a folder below it."""
    trainer = make_trainer(tmp_path, with_rows(("mine", *others)), **TWO_STEPS)
    trainer.train()
    assert_scores_survive(trainer)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_checkpoint_of_an_adapter_of_any_name_is_loaded(tmp_path, name):
    """A figure that never changes makes the first one the best."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "student_first", "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, with_rows((name,)), **settings)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.state.best_global_step == 3 and losses[3] != pytest.approx(losses[6], rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[3], rel=1e-6)


def test_a_loaded_adapter_that_is_not_trainable_is_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path, **TWO_STEPS)
    trainer.train()
    trainer.save_model()
    trainable = PeftModel.from_pretrained(tiny_model(), tmp_path / "out" / ADAPTER_FOLDER, is_trainable=True)
    make_trainer(tmp_path / "b", trainable, **TWO_STEPS).train()
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(tmp_path / "c", PeftModel.from_pretrained(tiny_model(), tmp_path / "out" / ADAPTER_FOLDER))


def test_a_saved_lora_config_can_be_used_again(tmp_path):
    """`save_pretrained` writes inference_mode=true: without a word nothing would be trainable."""
    trainer = make_trainer(tmp_path, **TWO_STEPS)
    trainer.save_model()
    saved = LoraConfig.from_pretrained(tmp_path / "out" / ADAPTER_FOLDER)
    make_trainer(tmp_path / "b", peft_config=saved, **TWO_STEPS).train()


def test_the_rows_that_score_are_those_of_the_head(tmp_path):
    """An adapter may train rows of the input embedding beside them."""
    indices = {"embed_tokens": list(RESERVED), "lm_head": list(RESERVED)}
    trainer = make_trainer(tmp_path, with_rows(trainable_token_indices=indices), max_steps=1)
    head = trainer.base_model.get_output_embeddings().token_adapter.trainable_tokens_delta["default"]
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(head, before)


def test_an_interrupted_step_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, adapter_scope="sequence")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    before = trainer.model(input_ids=batch["input_ids"]).logits
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(
            "transformers_s2t.losses.text_kl", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        trainer.compute_loss(trainer.model, batch)
    assert torch.equal(trainer.model(input_ids=batch["input_ids"]).logits, before)
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("form", ["bfloat16", "autocast", "both"])
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_low_precision_keeps_what_is_trained_in_float32(tmp_path, scope, form):
    model = tiny_model().to(torch.float32 if form == "autocast" else torch.bfloat16)
    trainer = make_trainer(tmp_path, model, adapter_scope=scope, bf16=form != "bfloat16", **TWO_STEPS)
    for name, value in trained(trainer).items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), name


def test_the_saved_weights_are_an_adapter_of_peft(tmp_path):
    """In their own folder, which whoever loads it has to name."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, str(tmp_path / "model"), **TWO_STEPS)
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    ids = PROMPT["input_ids"]
    trainer.model.eval()
    expected = trainer.views().adapted(input_ids=ids).logits
    adapter = tmp_path / "elsewhere" / ADAPTER_FOLDER
    loaded = PeftModel.from_pretrained(tiny_model(), adapter)(input_ids=ids).logits
    by_auto = AutoModelForCausalLM.from_pretrained(adapter)(input_ids=ids).logits
    text = slice(0, RESERVED[0])  # the trainer's own head never shows the reserved rows
    assert torch.allclose(loaded[..., text], expected[..., text], atol=1e-5)
    assert torch.allclose(by_auto[..., text], expected[..., text], atol=1e-5)


# ---- the LoRA settings ----


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"task_type": "SEQ_CLS"},
        {"exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_lora_settings_of_every_kind_train_save_and_leave_the_text_alone(tmp_path, config):
    trainer = make_trainer(tmp_path, peft_config=lora(**config), **TWO_STEPS)
    trainer.train()
    assert trainer.model.generate(**PROMPT).tolist() == tiny_model().generate(**PROMPT).tolist()
    assert_scores_survive(trainer)


@pytest.mark.parametrize("module", ["lm_head", "model.lm_head"])
def test_a_second_copy_of_the_head_is_refused_in_our_words(tmp_path, module):
    with pytest.raises(ValueError, match="`modules_to_save` of `peft_config` must not name the head"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["q_proj"], modules_to_save=[module]))


@pytest.mark.parametrize(
    "config",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 2), (0, 2)]},
    ],
    ids=str,
)
def test_lora_settings_that_change_the_base_model_are_refused(tmp_path, config):
    """They cannot be switched off, so that ordinary text would be another one, with and without the selector."""
    with pytest.raises(ValueError, match=next(iter(config))):
        make_trainer(tmp_path, tiny_model(attention_bias=True), peft_config=lora(**config))


def test_token_indices_of_the_users_own_are_not_dropped_without_a_word(tmp_path):
    with pytest.raises(ValueError, match="trainable_token_indices"):
        make_trainer(tmp_path, peft_config=lora(trainable_token_indices={"lm_head": [90, 91, 92]}))


# ---- the labels ----


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_labels_in_another_format_are_labels(tmp_path, form):
    trainer = make_trainer(tmp_path, labels=make_labels().with_format(form), max_steps=1)
    assert len(trainer.train_dataset) == 12
    trainer.train()


@pytest.mark.parametrize(
    "dataset", [make_labels().to_iterable_dataset(), make_labels().to_list()], ids=["lazy", "list"]
)
def test_what_is_no_dataset_is_refused_by_name(tmp_path, dataset):
    with pytest.raises(TypeError, match="`train_dataset` must be a datasets.Dataset.*got <class"):
        make_trainer(tmp_path, labels=dataset)


def test_labels_that_are_prepared_already_can_be_used_again(tmp_path):
    first = make_trainer(tmp_path / "a", **TWO_STEPS)
    again = make_trainer(tmp_path / "b", labels=first.train_dataset, eval_dataset=first.eval_dataset, **TWO_STEPS)
    before, after = trained(first), trained(again)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_labels_that_are_prepared_already_obey_the_settings_of_now(tmp_path):
    """Cut for 8192 tokens they would not fit into the memory that a smaller `max_packed_tokens` is to bound."""
    first, fresh = make_trainer(tmp_path), make_trainer(tmp_path, max_packed_tokens=19)
    again = make_trainer(tmp_path, labels=first.train_dataset, max_packed_tokens=19)
    assert max(again.train_dataset["length"]) <= 19 and len(again.train_dataset) == len(fresh.train_dataset)


@pytest.mark.parametrize("form", ["folder", "dict"])
def test_held_out_labels_of_another_tokenizer_are_refused(tmp_path, form):
    """Whether or not the training labels come with a header of their own."""
    labels = str(folder_of_labels(tmp_path / "labels", vocab_hash="0" * 16))
    with pytest.raises(ValueError, match="eval_dataset|another tokenizer|different tokenizers|label with this model"):
        make_trainer(tmp_path, eval_dataset=labels if form == "folder" else {"far": labels})


def test_held_out_labels_of_another_model_are_refused_as_those_to_train_on_are(tmp_path):
    from transformers_s2t.reserved_tokens import vocab_hash

    labels = str(folder_of_labels(tmp_path / "labels", vocab_hash(tiny_tokenizer()), model_hash="0" * 16))
    with pytest.raises(ValueError, match="allow_labels_of_other_model"):
        make_trainer(tmp_path, labels=labels)
    with pytest.raises(ValueError, match="allow_labels_of_other_model"):
        make_trainer(tmp_path, eval_dataset=labels)


def test_points_that_are_left_out_are_named_at_every_run(tmp_path):
    """The second run reads what `datasets` remembers of the first."""
    labels = str(folder_of_labels(tmp_path / "labels"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="decision points lie beyond max_packed_tokens=16"):
            make_trainer(tmp_path, labels=labels, eval_dataset=labels, max_packed_tokens=16)


def test_a_folder_of_labels_can_be_evaluated_as_it_can_be_given(tmp_path):
    labels = folder_of_labels(tmp_path / "labels")
    trainer = make_trainer(tmp_path)
    expected = trainer.evaluate()["eval_agree_at_1"]  # the same labels in memory
    assert trainer.evaluate(str(labels))["eval_agree_at_1"] == expected
    assert trainer.evaluate({"far": str(labels)})["eval_far_agree_at_1"] == expected


def test_predict_prepares_its_labels_as_evaluate_does(tmp_path):
    trainer = make_trainer(tmp_path, max_packed_tokens=19)
    randomise(trainer)
    with pytest.raises(ValueError, match="`candidate_ids` must be below 97"):
        trainer.predict(spoil("candidate_ids", 5000))
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(rows) or collate(rows)
    figures = trainer.predict(make_labels(seed=1)).metrics
    assert figures["test_agree_at_1"] == pytest.approx(trainer.evaluate()["eval_agree_at_1"])
    assert max(len(row["input_ids"]) + sum(map(len, row["candidate_ids"])) for rows in batches for row in rows) <= 19


def test_a_teacher_that_says_nothing_gives_finite_weights(tmp_path):
    """All candidates level, all missing, two candidates, one row."""
    weights = {"distribution_kl_weight": 1.0, "hinge_weight": 1.0, "logprob_weight": 1.0, "temperature": 1e-3}
    for value, size in ((-1.0, K), (-1e4, K), (-1e4, 2)):
        rows = [row | {"teacher_logprobs": [[value] * K] * len(row["positions"])} for row in make_labels(1)]
        trainer = make_trainer(tmp_path, labels=Dataset.from_list(rows), num_candidates=size, max_steps=3, **weights)
        assert all(torch.isfinite(tensor).all() for tensor in trained(trainer).values())


# ---- the settings ----


@pytest.mark.parametrize("setting", [{"neftune_noise_alpha": 50.0}, {"label_smoothing_factor": 0.5}], ids=str)
def test_a_setting_of_transformers_acts_or_is_refused(tmp_path, setting):
    try:
        changed = trained(make_trainer(tmp_path / "a", **setting, **TWO_STEPS))
    except ValueError as error:
        assert next(iter(setting)) in str(error)
        return
    plain = trained(make_trainer(tmp_path / "b", **TWO_STEPS))
    assert any(not torch.equal(value, changed[name]) for name, value in plain.items())


CONSTANT = {"lr_scheduler_type": "constant"} | TWO_STEPS


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    return trained(make_trainer(tmp_path_factory.mktemp("plain"), **CONSTANT))


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 1, "torch_empty_cache_steps": 1, "average_tokens_across_devices": False},
        {"dataloader_drop_last": True, "auto_find_batch_size": True, "include_num_input_tokens_seen": "all"},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_accumulation_steps": 1},
        {"include_for_metrics": ["loss", "inputs"], "batch_eval_metrics": True, "eval_strategy": "epoch"},
        {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
        {"accelerator_config": {"dispatch_batches": True}},
    ],
    ids="+".join,
)
def test_settings_that_are_not_to_matter_do_not(tmp_path, plain_weights, settings):
    changed = trained(make_trainer(tmp_path, **CONSTANT | settings))
    assert all(torch.equal(value, changed[name]) for name, value in plain_weights.items())


@pytest.mark.parametrize("name, value", [("temperature", "0.1"), ("hinge_weight", "1"), ("temperature", None)])
def test_a_number_that_is_none_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value!r}"):
        S2TConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_one_reserved_id_in_place_of_a_list_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="`reserved_token_ids`"):
        S2TConfig(output_dir=str(tmp_path), use_cpu=True, reserved_token_ids=5)


def test_a_config_can_be_copied_pickled_replaced_and_written(tmp_path):
    settings = {"adapter_scope": "sequence", "torch_compile": True, "load_best_model_at_end": True}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "model_init_kwargs": {"dtype": "float32"}}
    args = S2TConfig(output_dir=str(tmp_path), use_cpu=True, reserved_token_ids=[5, 6], **settings)
    written = json.loads(args.to_json_string())
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert json.loads(other.to_json_string()) == written and other.torch_compile
    assert dataclasses.replace(args, temperature=0.5).temperature == 0.5


def test_an_ordinary_run_warns_of_nothing_that_its_user_did_not_say(tmp_path):
    """PEFT asks transformers for a name that it deprecates: theirs to mend."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, eval_strategy="epoch", save_strategy="epoch", **TWO_STEPS)
        trainer.train()
        trainer.save_model()
    shown = {str(warning.message) for warning in caught if issubclass(warning.category, (UserWarning, FutureWarning))}
    assert not {message for message in shown if "is_gradient_checkpointing" not in message}


def test_weight_decay_leaves_the_reserved_rows_alone(tmp_path):
    """What PEFT calls their delta are the rows themselves: decay would pull them to zero."""
    trainer = make_trainer(tmp_path, weight_decay=0.1)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert any("lora_A" in name for name in decayed) and not any("trainable_tokens" in name for name in decayed)


# ---- what is saved ----


def test_every_checkpoint_states_its_own_figures(tmp_path):
    """Not those of the best one so far, which it is not."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    ruin = {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 30,
        "learning_rate": 0.3,
        "max_grad_norm": 0.0,
    }
    trainer = make_trainer(tmp_path, num_train_epochs=6, **settings, **ruin)
    trainer.train()
    agree = {log["step"]: log["eval_agree_at_1"] for log in trainer.state.log_history if "eval_agree_at_1" in log}
    assert len(set(agree.values())) > 1
    stated = {
        step: SelectorConfig.from_pretrained(tmp_path / "out" / f"checkpoint-{step}").metrics["agree_at_1"]
        for step in agree
    }
    assert stated == pytest.approx(agree)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    files = ("s2t/adapter_model.safetensors", "s2t/adapter_config.json", "s2t_config.json", "README.md")
    runs = []
    for i in range(2):
        trainer = make_trainer(tmp_path / str(i), peft_config=lora(lora_dropout=0.1), **TWO_STEPS)
        trainer.train()
        trainer.save_model()
        runs.append([(tmp_path / str(i) / "out" / name).read_bytes() for name in files])
    assert runs[0] == runs[1]


def test_a_card_names_a_folder_that_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, output_dir=".")
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("")' not in card and "\n# \n" not in card


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    """Also where the model's folder is gone by then."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path, str(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    trainer.save_model()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_stopped_run_that_pushed_a_checkpoint_goes_on(tmp_path, monkeypatch):
    """recipes/train.py takes `s2t_config.json` in `output_dir` for the sign that all is done."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"push_to_hub": True, "hub_model_id": "you/selector", "hub_token": "hf_abc"}
    with TinyHub(monkeypatch) as hub:
        settings |= {"save_strategy": "steps", "save_steps": 1, **TWO_STEPS}
        trainer = make_trainer(tmp_path, str(tmp_path / "model"), **settings)
        trainer.train()
        trainer._finish_current_push()
    assert {"s2t_config.json", "seen_problems.json"} <= hub.files("you/selector").keys()
    options = {"model": tmp_path / "model", "labels": folder_of_labels(tmp_path / "labels"), "num_candidates": K}
    options |= {"output_dir": tmp_path / "out", "use_cpu": "true", "dtype": "float32", "min_prob_ratio": 0}
    prepared = train.prepare([part for name, value in options.items() for part in (f"--{name}", str(value))])
    assert prepared is not None
    assert Path(prepared[2]).name == "checkpoint-2"


def test_a_selector_trained_on_more_than_eight_candidates_offers_eight(tmp_path):
    """As in the paper: 16 to train on, 8 to decode with."""
    rows = make_labels().to_list()
    for row in rows:
        size = len(row["positions"])
        row["candidate_ids"] = [list(range(20 + n, 32 + n)) for n in range(size)]
        row["student_logprobs"] = row["teacher_logprobs"] = [[-float(k) for k in range(12)]] * size
    trainer = make_trainer(
        tmp_path, labels=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows), num_candidates=12
    )
    assert trainer.selector_config().num_candidates == 8


def test_a_second_training_reports_its_own_figures_alone(tmp_path):
    """The first one ends between two log lines."""
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    seen = []
    trainer._agreement, plain = lambda *args: seen.append(plain(*args)) or seen[-1], trainer._agreement
    trainer.train()
    hits, count = (sum(float(step["hit_at_2"][i].sum()) for step in seen[:2]) for i in (0, 1))
    first = next(log for log in trainer.state.log_history if "hit_at_2" in log)
    assert first["hit_at_2"] == pytest.approx(hits / count, abs=1e-5)


# ---- what `Trainer` takes ----


def test_the_users_own_metrics_collator_and_optimizer_take_part(tmp_path):
    """`compute_metrics` sees every held-out point that has a choice once, whatever the batches are."""
    seen, batches = [], []

    def metrics(prediction):
        seen.append(prediction)
        picks, target_N = prediction.predictions.argmax(-1), prediction.label_ids
        return {"agreement": float((picks == target_N).mean())}

    def collate(rows):
        batches.append(len(rows))
        return TrajectoryCollator(PAD, K)(rows)

    optimizer = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.5})
    settings = {"compute_metrics": metrics, "data_collator": collate, "optimizer_cls_and_kwargs": optimizer}
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2, trainer=settings, **TWO_STEPS)
    figures = trainer.evaluate()
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD) and len(batches) > 2
    assert figures["eval_agreement"] == pytest.approx(figures["eval_agree_at_1"])
    assert len(seen[0].label_ids) == len(seen[0].predictions) and seen[0].predictions.shape[1] == K
    assert "eval_selection_loss" not in figures, "it was eval_loss once more"


def test_other_forms_of_a_dataset_are_refused_with_what_to_do(tmp_path):
    labels = make_labels()
    with pytest.raises(TypeError, match=r"`train_dataset` must be one split.*labels\['train'\]"):
        make_trainer(tmp_path, labels=DatasetDict(train=labels, validation=labels))
    with pytest.raises(TypeError, match="Dataset.from_generator"):
        make_trainer(tmp_path, labels=labels.to_iterable_dataset())
    streamed = labels.to_iterable_dataset()
    made = Dataset.from_generator(lambda: iter(streamed), features=labels.features, cache_dir=str(tmp_path / "cache"))
    make_trainer(tmp_path, labels=made)


@pytest.mark.parametrize(
    "has_gpu, settings, expected", [(True, {}, True), (True, {"fp16": True}, False), (False, {}, False)]
)
def test_mixed_precision_is_the_default_where_the_gpu_has_it(tmp_path, monkeypatch, has_gpu, settings, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    assert S2TConfig(output_dir=str(tmp_path), **settings).bf16 is expected
