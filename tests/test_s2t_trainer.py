"""S2TTrainer on tiny random models: what it computes, what it changes, what it saves, what it refuses.

Legend: B trajectories, N decision points, K candidates.
"""

import hashlib
import json
import os
import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import EOS, RESERVED, tiny_model
from tiny_hub import TinyHub
from tiny_labels import NUM_CANDIDATES as K
from tiny_labels import make_labels, make_uneven_labels, tiny_tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback

from transformers_s2t import LocalSelector, S2TConfig, S2TTrainer, SelectorConfig
from transformers_s2t.calibration.scored_points import score_labels
from transformers_s2t.fusion import fit_fusion
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.models.views import adapted_layers, get_decoder


def make_trainer(
    tmp_path, model=None, labels=None, peft_config=None, eval_dataset=None, callbacks=None, trainer=None, **config
):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 5e-3,
        "num_train_epochs": 1,
        "warmup_steps": 0,
        "min_prob_ratio": 0.0,
        "num_candidates": K,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "weight_decay": 0.1,
    } | config
    if peft_config is None and not isinstance(model, PeftModel):
        peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return S2TTrainer(
        model=tiny_model() if model is None else model,
        args=S2TConfig(**settings),
        train_dataset=make_labels() if labels is None else labels,
        eval_dataset=make_labels(seed=1) if eval_dataset is None else eval_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
        **(trainer or {}),
    )


def randomise(trainer):
    """Gives the fresh adapter (B = 0) random weights, so that it matters where it is on."""
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.2)


def naive_scores(trainer, row):
    """Scores (N, K) of a labelled row with one full forward per candidate, no packing and no cache."""
    base, adapted = trainer.views().base, trainer.views().adapted
    rows_RD = dict(trainer.model.named_parameters())
    rows_RD = next(value for name, value in rows_RD.items() if "trainable_tokens_delta" in name)
    out = []
    for position, candidates in zip(row["positions"], row["candidate_ids"]):
        scores = []
        for candidate in candidates:
            ids = torch.tensor([row["input_ids"][:position] + [candidate]])
            if trainer.args.adapter_scope == "sequence":
                hidden = get_decoder(adapted)(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            else:
                with torch.no_grad():
                    cache = get_decoder(base)(input_ids=ids[:, :-1], use_cache=True).past_key_values
                hidden = get_decoder(adapted)(
                    input_ids=ids[:, -1:], past_key_values=cache, use_cache=True
                ).last_hidden_state[0, -1]
            bins = torch.softmax(hidden.float() @ rows_RD.float().T, -1) @ torch.linspace(0, 1, len(RESERVED))
            scores.append(bins)
        out.append(torch.stack(scores))
    return torch.stack(out)


WINDOWED = {  # windows far shorter than the trajectories
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize(
    ("family", "attn"),
    [
        *((family, "sdpa") for family in ("llama", *WINDOWED)),
        ("llama", "eager"),
        *(pytest.param(family, "eager", marks=pytest.mark.slow) for family in WINDOWED),
    ],
)
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_packed_scores_equal_one_forward_per_candidate(tmp_path, scope, family, attn):
    model = tiny_model(family, attn=attn, **WINDOWED.get(family, {}))
    trainer = make_trainer(tmp_path, model, adapter_scope=scope)
    randomise(trainer)
    trainer.model.eval()
    rows = [trainer.train_dataset[i] for i in range(4)]
    with torch.no_grad():
        _, scores_BNK, _ = trainer._loss(trainer.data_collator(rows))
        for row, scores_NK in zip(rows, scores_BNK):
            assert torch.allclose(scores_NK[: len(row["positions"])], naive_scores(trainer, row), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow), "gemma3_text"])
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_flex_attention_packs_and_scores_the_same(tmp_path, scope, family):
    """Uncompiled, and without a backward pass: on a CPU it has none."""
    config = {"hidden_size": 64, "head_dim": 16} | WINDOWED.get(family, {})
    scores = []
    for attn in ("sdpa", "flex_attention"):
        trainer = make_trainer(tmp_path, tiny_model(family, attn=attn, **config), adapter_scope=scope)
        randomise(trainer)
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            scores.append(trainer._loss(batch)[1])
    assert torch.allclose(*scores, atol=1e-5) and scores[0].std() > 0.01


@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_gradient_equals_one_forward_per_candidate(tmp_path, scope):
    trainer = make_trainer(tmp_path, adapter_scope=scope, prefix_kl_weight=0.0)
    randomise(trainer)
    row = trainer.train_dataset[0]
    loss, _, _ = trainer._loss(trainer.data_collator([row]))
    loss.backward()
    packed = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    scores_NK = naive_scores(trainer, row)
    target_N = torch.tensor(row["teacher_logprobs"]).argmax(-1)
    torch.nn.functional.cross_entropy(scores_NK / trainer.args.temperature, target_N).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert torch.allclose(packed[name], parameter.grad, atol=1e-4), name


@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_dropout_is_the_adapters_alone(tmp_path, scope):
    """The base decodes without dropout, so the adapter learns to read it without."""
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    losses = {}
    for dropout in (0.0, 0.5):
        peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
        trainer = make_trainer(tmp_path, tiny_model("gpt2", **config), peft_config=peft_config, adapter_scope=scope)
        randomise(trainer)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        for mode in (True, False):
            trainer.model.train(mode)
            losses[dropout, mode] = trainer.compute_loss(trainer.model, batch).item()
            assert trainer.model.training == mode
    assert losses[0.0, True] == losses[0.0, False] == losses[0.5, False] != losses[0.5, True]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_one_step_changes_lora_and_reserved_rows_and_nothing_else(tmp_path, scope, tied):
    """Weight decay included: AdamW would decay rows that a gradient mask only meant to freeze."""
    trainer = make_trainer(tmp_path, tiny_model(tie_word_embeddings=tied), adapter_scope=scope, max_steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed) and any("trainable_tokens_delta" in name for name in changed)
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed), changed


@pytest.mark.parametrize("scope", ["candidate", pytest.param("sequence", marks=pytest.mark.slow)])
def test_it_learns_the_teachers_ranking(tmp_path, scope):
    trainer = make_trainer(tmp_path, labels=make_labels(80), adapter_scope=scope, num_train_epochs=8)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_agree_at_1"] > max(before["eval_agree_at_1"], after["eval_student_first"]) + 0.15
    assert after["eval_student_first"] == before["eval_student_first"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_saved_adapter_scores_the_same_after_loading(tmp_path, scope, tied):
    trainer = make_trainer(tmp_path, tiny_model(tie_word_embeddings=tied), adapter_scope=scope)
    trainer.train()
    trainer.model.eval()
    labels = make_labels().select(range(5))
    rows = labels.to_list()
    with torch.no_grad():
        _, scores_BNK, _ = trainer._loss(trainer.data_collator(rows))
    trainer.save_model()
    folder = tmp_path / "out"
    assert sum(file.stat().st_size for file in folder.rglob("adapter_model*")) < 60_000  # rows, never the whole head
    selector = LocalSelector.from_pretrained(folder, tiny_model(tie_word_embeddings=tied))
    assert selector.selector_config.adapter_scope == scope
    points = score_labels(selector, labels, num_candidates=K, min_prob_ratio=0.0)
    expected = torch.sort(torch.cat([s[: len(r["positions"])] for s, r in zip(scores_BNK, rows)]).flatten()).values
    assert torch.allclose(torch.sort(points.scores_NK.flatten()).values, expected, atol=1e-6)


def test_what_is_saved_names_figures_settings_and_how_to_load(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    config = SelectorConfig.from_pretrained(tmp_path / "out")
    assert config.reserved_token_ids == RESERVED and config.adapter_scope == "candidate"
    assert 0 <= config.metrics["agree_at_1"] <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LocalSelector.from_pretrained" in card and "agree_at_1" in card
    assert json.loads((tmp_path / "out" / "s2t" / "adapter_config.json").read_text())["r"] == 4


def test_long_trajectories_are_cut_into_blocks_with_the_same_figures(tmp_path):
    """Every point once; the prefix KL of a token once, though later blocks read it again."""
    whole = make_trainer(tmp_path, adapter_scope="sequence")
    cut = make_trainer(tmp_path, adapter_scope="sequence", max_packed_tokens=19)
    assert len(cut.train_dataset) > len(whole.train_dataset)
    count = [sum(len(row["positions"]) for row in t.train_dataset) for t in (whole, cut)]
    assert count[0] == count[1]
    assert all(len(r["input_ids"]) == r["positions"][-1] + 1 for r in cut.train_dataset)
    assert any(r["text_start"] for r in cut.train_dataset) and not any(r["text_start"] for r in whole.train_dataset)
    figures = []
    for trainer in (whole, cut):
        randomise(trainer)
        figures.append(trainer.evaluate())
    for name in ("eval_loss", "eval_prefix_kl", "eval_agree_at_1", "eval_spearman"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-5), name


def test_a_block_can_be_a_single_point_as_in_the_paper(tmp_path):
    whole, single = make_trainer(tmp_path), make_trainer(tmp_path, max_points_per_block=1)
    assert all(len(row["positions"]) == 1 for row in single.train_dataset)
    points = [[position for row in t.train_dataset for position in row["positions"]] for t in (whole, single)]
    assert points[0] == points[1]


def test_blocks_of_like_length_can_share_a_batch(tmp_path):
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length")
    for row in trainer.train_dataset:  # tokens that the model runs, not those of the text
        assert row["length"] == len(row["input_ids"]) + sum(map(len, row["candidate_ids"]))
    lengths = [row["length"] for row in trainer.eval_dataset]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1

    def padded(**config):
        trainer = make_trainer(tmp_path, labels=make_labels(60), **config)
        return sum(batch["attention_mask"].numel() for batch in trainer.get_train_dataloader())

    assert padded(train_sampling_strategy="group_by_length") < padded()


def test_the_floor_leaves_candidates_out_of_the_competition(tmp_path):
    trainer = make_trainer(tmp_path, min_prob_ratio=0.5)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    _, scores_BNK, _ = trainer._loss(batch)
    below = batch["student_logprobs"] < batch["student_logprobs"][..., :1] + torch.log(torch.tensor(0.5))
    assert below.any() and (scores_BNK[below] == 0).all()


def test_extra_losses_and_read_outs_run_and_move_the_loss(tmp_path):
    plain = make_trainer(tmp_path)
    mixed = make_trainer(
        tmp_path, distribution_kl_weight=0.1, hinge_weight=1.0, logprob_weight=1.0, score_head="linear"
    )
    batch = plain.data_collator([plain.train_dataset[0]])
    assert plain._loss(batch)[0].item() != pytest.approx(mixed._loss(batch)[0].item())


def test_prefix_kl_is_zero_for_a_fresh_adapter_and_grows_with_it(tmp_path):
    trainer = make_trainer(tmp_path, adapter_scope="sequence")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert trainer._loss(batch)[2]["prefix_kl"][0].item() == pytest.approx(0.0, abs=1e-6)
    randomise(trainer)
    assert trainer._loss(batch)[2]["prefix_kl"][0].item() > 0.01


@pytest.mark.parametrize(
    "family, config",
    [
        ("gemma2", {"final_logit_softcapping": 0.5, "sliding_window": 64}),
        ("granite", {"logits_scaling": 4.0}),
        ("llama", {}),
    ],
)
def test_prefix_kl_is_that_of_the_models_own_logits(tmp_path, family, config):
    """A head may cap or scale what its matrix gives: reading the matrix alone is another distribution."""
    trainer = make_trainer(tmp_path, tiny_model(family, attn="eager", **config), adapter_scope="sequence")
    randomise(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    total, count = trainer._loss(batch)[2]["prefix_kl"]
    for row in range(3):
        ids = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
        with torch.no_grad():
            views = trainer.views()
            logits = {on: (views.adapted if on else views.base)(input_ids=ids).logits[0] for on in (True, False)}
        logprobs = {on: value[:, : RESERVED[0]].log_softmax(-1) for on, value in logits.items()}
        expected = (logprobs[False].exp() * (logprobs[False] - logprobs[True])).sum()
        assert total[row] == pytest.approx(float(expected), rel=1e-4) and count[row] == ids.shape[1]
        assert expected > 1e-3


def test_reserved_tokens_can_be_added_to_a_model_without_any(tmp_path):
    small = tiny_model(vocab_size=RESERVED[0])
    with pytest.raises(ValueError, match="add_reserved_tokens"):
        make_trainer(tmp_path, small)
    trainer = make_trainer(tmp_path, tiny_model(vocab_size=RESERVED[0]), add_reserved_tokens=True)
    trainer.train()
    trainer.save_model()
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 12, "do_sample": False}
    before = tiny_model(vocab_size=RESERVED[0]).generate(**prompt)
    selector = LocalSelector.from_pretrained(tmp_path / "out", tiny_model(vocab_size=RESERVED[0]))
    assert min(selector.selector_config.reserved_token_ids) >= RESERVED[0]
    assert selector.model.generate(**prompt).tolist() == before.tolist()


def test_a_peft_model_with_reserved_rows_is_taken_as_it_is(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="trainable_token_indices"):
        make_trainer(tmp_path, get_peft_model(tiny_model(), config))
    config.trainable_token_indices = {"lm_head": list(RESERVED)}
    trainer = make_trainer(tmp_path, get_peft_model(tiny_model(), config))
    assert trainer.reserved_token_ids == RESERVED
    assert adapted_layers(trainer.base_model, trainer.adapter_name)


def test_labels_of_another_tokenizer_are_refused(tmp_path):
    header = TrajectoryHeader(
        model="other", teacher_model="teacher", vocab_hash="0" * 16, num_candidates=K, target_rate=0.1
    )
    with pytest.raises(ValueError, match="label with this model"):
        S2TTrainer(
            model=tiny_model(),
            args=S2TConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=make_labels(),
            processing_class=tiny_tokenizer(),
            label_header=header,
        )


def test_bad_data_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        make_trainer(tmp_path, labels=make_labels().select([]))
    with pytest.raises(ValueError, match="candidate_ids"):
        make_trainer(tmp_path, labels=make_labels().remove_columns("candidate_ids"))
    with pytest.raises(ValueError, match="no decision point"):
        make_trainer(tmp_path, min_prob_ratio=1.0)
    with pytest.raises(FileNotFoundError):
        make_trainer(tmp_path, labels=str(tmp_path / "nowhere"))


def spoil(column, value):
    """Labels whose second row has this value at the first place of a column."""
    rows = make_labels().to_list()
    place = rows[1][column]
    while isinstance(place[0], list):
        place = place[0]
    place[0] = value
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "labels, message",
    [
        (lambda: spoil("teacher_logprobs", float("nan")), "`teacher_logprobs` must hold finite numbers, got nan"),
        (lambda: spoil("student_logprobs", float("nan")), "`student_logprobs` must hold finite numbers, got nan"),
        (lambda: spoil("candidate_ids", 5000), "`candidate_ids` must be below 97, the model's vocabulary, got 5000"),
        (lambda: spoil("input_ids", 97), "`input_ids` must be below 97"),
        (lambda: spoil("candidate_ids", RESERVED[3]), "`candidate_ids` must be text, got the reserved tokens"),
        (lambda: spoil("positions", 2), "`positions` must be in"),
        (lambda: Dataset.from_list([make_labels()[0] | {"input_ids": []}]), "`prompt_length` must be an integer in"),
    ],
)
@pytest.mark.parametrize("columns", ["all", "what training reads"])
def test_spoilt_rows_are_refused_with_the_column_and_the_row(tmp_path, labels, message, columns):
    labels = labels()
    if columns != "all":
        labels = labels.remove_columns(["problem_id", "divergence", "entropy", "margin"])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_trainer(tmp_path, labels=labels)
    assert "train_dataset" in str(error.value) and (columns != "all" or "p0-" in str(error.value))


def test_a_sharded_model_without_a_tree_is_refused(tmp_path, monkeypatch):
    """Its processes would run different numbers of forwards and wait for each other for ever."""
    monkeypatch.setattr("transformers_s2t.training.s2t_trainer.is_deepspeed_zero3_enabled", lambda: True)
    make_trainer(tmp_path)
    with pytest.raises(ValueError, match="BloomForCausalLM takes a forward for every decision point"):
        make_trainer(tmp_path, tiny_model("bloom", attn="eager", n_layer=2, n_head=4))


def test_a_model_that_is_spread_over_processes_is_refused(tmp_path):
    """As ZeRO-3 leaves it: every weight is elsewhere, and nothing is left to count or to fingerprint."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match="`model` is spread over processes already"):
        make_trainer(tmp_path, model)


def test_labels_of_another_k_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hold 4 candidates per point, num_candidates=8 asks for more"):
        make_trainer(tmp_path, num_candidates=8)
    make_trainer(tmp_path, num_candidates=3)  # more than are asked for are no harm


def test_columns_that_nobody_asked_for_are_no_harm(tmp_path):
    labels = make_labels().add_column("note", ["mine"] * 12)
    assert len(make_trainer(tmp_path, labels=labels).train_dataset) == 12


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"adapter_scope": "prompt"},
        {"proposals": "adapted"},
        {"num_candidates": 1},
        {"max_points_per_block": 0},
        {"min_prob_ratio": 1.5},
        {"cross_entropy_weight": 0.0},
        {"remove_unused_columns": True},
    ],
)
def test_config_errors_name_the_argument(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        S2TConfig(output_dir=str(tmp_path), **bad)


def test_compiled_layers_train_the_same(tmp_path):
    """Captured and run again by dynamo; that a compiler keeps its promises is not ours to test."""
    from torch._dynamo.utils import counters

    counters.clear()
    settings = {"adapter_scope": "sequence", "max_steps": 3}
    whole = trained(make_trainer(tmp_path / "a", **settings))
    assert not counters["stats"]
    compiled = make_trainer(tmp_path / "b", torch_compile=True, torch_compile_backend="eager", **settings)
    for name, value in trained(compiled).items():
        assert torch.allclose(value, whole[name], atol=1e-5), name
    assert counters["stats"]["unique_graphs"] > 0
    compiled.save_model()
    assert not any(
        "_orig_mod" in name for name in load_file(tmp_path / "b" / "out" / "s2t" / "adapter_model.safetensors")
    )


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    """By way of accelerate it compiled nothing, and two processes trained apart from each other without a word."""
    for setting in ({"torch_compile": True}, {"torch_compile_backend": "inductor"}, {"torch_compile_mode": "default"}):
        with pytest.raises(ValueError, match="`torch_compile` must be False with adapter_scope='candidate'"):
            S2TConfig(output_dir=str(tmp_path), use_cpu=True, **setting)
        args = S2TConfig(output_dir=str(tmp_path), use_cpu=True, adapter_scope="sequence", **setting)
        assert args.torch_compile and "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    for backend in ("NO", "no"):  # as `accelerate launch` says it
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        S2TConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="`--dynamo_backend` of accelerate must be no"):
        S2TConfig(output_dir=str(tmp_path), use_cpu=True)


def test_resuming_from_a_checkpoint_gives_the_uninterrupted_weights(tmp_path):
    straight = make_trainer(tmp_path / "a", num_train_epochs=2)
    straight.train()
    first = make_trainer(tmp_path / "b", num_train_epochs=2, save_strategy="steps", save_steps=3)
    first.train()
    resumed = make_trainer(tmp_path / "b", num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-3"))
    ours, theirs = (dict(t.model.named_parameters()) for t in (straight, resumed))
    for name, parameter in ours.items():
        assert torch.allclose(parameter, theirs[name], atol=1e-6), name


def test_the_best_checkpoint_is_that_of_agree_at_1(tmp_path):
    """It learns its evaluation set, then its weights are overwritten, so the best step is not the last one."""

    class Ruin(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == args.num_train_epochs - 1:
                randomise(trainer)

    trainer = make_trainer(
        tmp_path,
        labels=make_labels(),
        eval_dataset=make_labels(),
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        callbacks=[Ruin()],
    )
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("agree_at_1", True)
    trainer.train()
    agree = {log["step"]: log["eval_agree_at_1"] for log in trainer.state.log_history if "eval_agree_at_1" in log}
    best = max(agree, key=agree.get)
    assert trainer.state.best_global_step == best != max(agree) and agree[best] > agree[max(agree)]
    assert trainer.evaluate()["eval_agree_at_1"] == pytest.approx(agree[best])
    trainer.save_model()
    assert SelectorConfig.from_pretrained(tmp_path / "out").metrics["agree_at_1"] == pytest.approx(agree[best])


def test_an_ordinary_run_warns_of_nothing(tmp_path):
    """What a user cannot act upon is noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()


def test_plain_callbacks_see_the_figures_and_can_stop_the_training(tmp_path):
    class Recorder(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[recorder, EarlyStoppingCallback(early_stopping_patience=2)],
        learning_rate=0.0,  # nothing ever becomes better
        num_train_epochs=9,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.epoch == 3
    train_logs = [log for log in recorder.logs if "loss" in log]
    assert len(train_logs) == 9
    for name in ("agree_at_1", "fused_agree_at_1", "spearman", "student_first", "second_candidate", "hit_at_1"):
        assert all(name in log for log in train_logs), name
        assert sum(f"eval_{name}" in log for log in recorder.logs) == 3, name


def test_several_evaluation_sets_need_to_say_which_one_decides(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    sets = {"easy": make_labels(seed=1), "hard": make_labels(seed=2)}
    with pytest.raises(ValueError, match="must name one of the evaluation sets.*easy_agree_at_1.*hard_agree_at_1"):
        make_trainer(tmp_path, eval_dataset=sets, **settings)
    trainer = make_trainer(tmp_path, eval_dataset=sets, metric_for_best_model="hard_agree_at_1", **settings)
    trainer.train()
    assert trainer.state.best_global_step
    assert any("eval_easy_agree_at_1" in log for log in trainer.state.log_history)


def test_labels_given_to_evaluate_are_prepared_as_well(tmp_path):
    trainer = make_trainer(tmp_path)
    spoilt = spoil("candidate_ids", 5000)
    with pytest.raises(ValueError, match="`eval_dataset`: `candidate_ids` must be below 97"):
        trainer.evaluate(spoilt)
    other = trainer.evaluate({"other": make_labels(seed=2)})
    assert other["eval_other_agree_at_1"] == trainer.evaluate(make_labels(seed=2))["eval_agree_at_1"]


def test_eos_is_a_candidate_like_any_other(tmp_path):
    labels = make_labels(2).to_list()
    labels[0]["candidate_ids"][0][0] = EOS
    trainer = make_trainer(tmp_path, labels=Dataset.from_list(labels))
    assert torch.isfinite(trainer._loss(trainer.data_collator([trainer.train_dataset[0]]))[0])


def test_what_training_pushes_is_the_selector_without_secrets(tmp_path, monkeypatch):
    """At the end, at every save, and the checkpoint itself; the arguments of a training hold tokens."""
    settings = {"push_to_hub": True, "hub_model_id": "you/selector", "hub_token": "hf_abc", "hub_always_push": True}
    settings |= {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "max_steps": 2}
    with TinyHub(monkeypatch) as hub:
        trainer = make_trainer(tmp_path, **settings)
        trainer.train()
        trainer._finish_current_push()
        during = hub.files("you/selector")
        trainer.push_to_hub(model_name="A name", dataset_name="you/labels", tags="math", license="mit", language="en")
        loaded = LocalSelector.from_pretrained("you/selector", tiny_model())
    pushed = hub.files("you/selector")
    assert hub.tokens == {"hf_abc"} and loaded.selector_config.reserved_token_ids == RESERVED
    selector = {"s2t/adapter_model.safetensors", "adapter_config.json", "s2t_config.json", "README.md"}
    assert selector <= during.keys() and selector <= pushed.keys()
    beside = {name for name in pushed if name.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= beside
    assert not [
        name for name in pushed if name.endswith("training_args.bin") or "checkpoint-" in name.split("/")[0][5:]
    ]
    assert not [name for name, data in pushed.items() if b"hf_abc" in data]
    assert b"hf_abc" not in (tmp_path / "out" / "training_args.bin").read_bytes()
    card = pushed["README.md"].decode()
    assert 'LocalSelector.from_pretrained("you/selector", model)' in card and "# A name" in card
    assert all(line in card for line in ("license: mit", "- en", "- math", "- you/labels"))


def test_the_seed_decides_the_adapter_and_nothing_else_does(tmp_path):
    """LoRA draws its random half when it is put in, before `Trainer` sets the seed."""
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + i)  # whatever ran before in the process
        trainer = make_trainer(tmp_path / str(i), model=tiny_model(), seed=seed)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" in name})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def trained(trainer):
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_an_optimizer_step_does_not_depend_on_how_it_is_split(tmp_path, scope):
    """Rows hold different numbers of points: a mean of the means of batches would weigh them differently."""
    labels = make_uneven_labels()
    settings = {"adapter_scope": scope, "max_steps": 3}
    whole = trained(make_trainer(tmp_path / "a", labels=labels, per_device_train_batch_size=6, **settings))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    parts = trained(make_trainer(tmp_path / "b", labels=labels, **split, **settings))
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-5), name


def test_the_held_out_loss_does_not_depend_on_the_batch(tmp_path):
    figures = []
    for size in (1, 5):
        trainer = make_trainer(tmp_path / str(size), adapter_scope="sequence", per_device_eval_batch_size=size)
        randomise(trainer)
        figures.append(trainer.evaluate())
    names = ("eval_loss", "eval_selection_loss", "eval_prefix_kl", "eval_fused_agree_at_1", "eval_spearman")
    for name in (*names, "eval_hit_at_2"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-5), name
    assert figures[0]["eval_loss"] == pytest.approx(figures[0]["eval_selection_loss"] + figures[0]["eval_prefix_kl"])


def rollouts(num_problems, seed=1):
    """Three rows of every problem: one prompt, different text and points."""
    rows = make_labels(3 * num_problems, seed).to_list()
    for i, row in enumerate(rows):
        row["input_ids"][: row["prompt_length"]] = rows[i - i % 3]["input_ids"][: row["prompt_length"]]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("blocks", ["whole", "cut"])
def test_the_fused_figure_is_that_of_weights_fitted_on_the_other_problems(tmp_path, blocks):
    """By hand: point by point, problems in the order of their prompts' digests, every second one in each fold."""
    labels = rollouts(9)
    cut = {"max_packed_tokens": 19} if blocks == "cut" else {}
    trainer = make_trainer(tmp_path, eval_dataset=labels, per_device_eval_batch_size=4, score_head="linear", **cut)
    randomise(trainer)
    found = trainer.evaluate()
    trainer.model.eval()
    prompts = [tuple(row["input_ids"][: row["prompt_length"]]) for row in labels]
    order = sorted(set(prompts), key=lambda prompt: hashlib.sha256(repr(list(prompt)).encode()).digest())
    assert len(order) == 9
    points, folds = [], []
    for row, prompt in zip(labels, prompts):
        with torch.no_grad():
            _, scores_BNK, _ = trainer._loss(trainer.data_collator([row]))
        folds += [order.index(prompt) % 2] * len(row["positions"])
        points.append((scores_BNK[0], torch.tensor(row["student_logprobs"]), torch.tensor(row["teacher_logprobs"])))
    scores_NK, logprobs_NK, teacher_NK = (torch.cat(parts) for parts in zip(*points))
    fold_N, target_N, mask_NK = torch.tensor(folds), teacher_NK.argmax(-1), torch.ones_like(scores_NK).bool()
    hits = 0
    for fold in (0, 1):
        rest_N = fold_N != fold
        fusion = fit_fusion(scores_NK[rest_N], logprobs_NK[rest_N], mask_NK[rest_N], target_N[rest_N])
        fused_NK = fusion.selector * scores_NK + fusion.logprob * logprobs_NK
        fused_NK[:, 1:] += fusion.switch
        hits += int((fused_NK.argmax(-1) == target_N)[~rest_N].sum())
    assert found["eval_fused_agree_at_1"] == pytest.approx(hits / len(target_N))
    fixed_NK = scores_NK / trainer.args.temperature + logprobs_NK
    assert hits != int((fixed_NK.argmax(-1) == target_N).sum()), "fixed weights give the same: nothing is tested"
    assert trainer._held_out is None


def test_with_too_few_points_the_fused_figure_is_that_of_fixed_weights(tmp_path):
    labels = make_labels(5, seed=1)  # 15 points, of which no two halves have ten each
    trainer = make_trainer(tmp_path, eval_dataset=labels)
    randomise(trainer)
    found = trainer.evaluate()["eval_fused_agree_at_1"]
    trainer.model.eval()
    batch = trainer.data_collator(labels.to_list())
    with torch.no_grad():
        _, scores_BNK, _ = trainer._loss(batch)
    fused_BNK = scores_BNK / trainer.args.temperature + batch["student_logprobs"]
    hits_BN = fused_BNK.argmax(-1) == batch["teacher_logprobs"].argmax(-1)
    assert found == pytest.approx(float(hits_BN.float().mean()))


def test_hit_at_k_counts_the_teachers_own_token_among_the_students_first(tmp_path):
    """In these labels it is the largest candidate id."""
    trainer = make_trainer(tmp_path)
    rows = [ids for row in make_labels(seed=1) for ids in row["candidate_ids"]]
    figures = trainer.evaluate()
    for size in (1, 2, 4):
        assert figures[f"eval_hit_at_{size}"] == pytest.approx(sum(max(r) in r[:size] for r in rows) / len(rows))
    assert -1 <= figures["eval_spearman"] <= 1


def test_gradient_checkpointing_leaves_the_gradient_what_it_was(tmp_path):
    """The adapter has to be on again when a checkpoint is computed a second time, in the backward pass."""
    whole = trained(make_trainer(tmp_path / "a", adapter_scope="sequence", max_steps=3))
    settings = {"adapter_scope": "sequence", "max_steps": 3, "activation_checkpointing": True}
    checkpointed = trained(make_trainer(tmp_path / "b", **settings))
    for name, value in whole.items():
        assert torch.allclose(value, checkpointed[name], atol=1e-6), name
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        with pytest.raises(ValueError, match="checkpointing` must be False with adapter_scope='candidate'"):
            S2TConfig(output_dir=str(tmp_path), use_cpu=True, **{name: True})
