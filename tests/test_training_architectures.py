"""Training of every architecture that decoding supports: scores, gradients, warnings and refusals.

The reference runs the full text again for every candidate, on a fresh model in eval mode, without PEFT, caches, masks,
padding or batches; gradients go through it to the trainer's own parameters.

Legend: B trajectories, T tokens, N decision points, K candidates, D hidden size, R reserved tokens, V vocabulary.
"""

import warnings
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_s2t_trainer import make_trainer, randomise
from tiny import RESERVED, VOCAB_SIZE, in_turn
from tiny_architectures import COMMON, FAMILIES, REFUSED, REPEATED, NaiveCausalLM, make_model
from tiny_labels import make_labels, make_uneven_labels
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transformers_s2t import LocalSelector, S2TDecodingConfig, S2TTrace
from transformers_s2t.decoding.session import S2TSession
from transformers_s2t.scoring.packing import warn_without_tree


FLOOR = 0.05
PROPOSALS = {"candidate": "base", "sequence": "adapted"}  # each scope with who can write the text
CASES = [  # by day the second attention implementation with one of the scopes
    pytest.param(
        name, attn, scope, id=f"{name}-{attn}-{scope}", marks=pytest.mark.slow if i and (i + j + k) % 2 else ()
    )
    for k, (name, family) in enumerate(FAMILIES.items())
    for i, attn in enumerate(family.impls[: 1 if name in REPEATED else 2])  # without tree masks they are one
    for j, scope in enumerate(PROPOSALS)
]


@cache
def make_ragged_labels(num_rows=2):
    """Trajectories of different lengths with three points and one; the first point has two candidates above FLOOR."""
    rows = make_uneven_labels(num_rows).to_list()
    return Dataset.from_list(
        [row | {"student_logprobs": [[-0.1, -3.0, -5.0, -9.0], *row["student_logprobs"][1:]]} for row in rows]
    )


def trainer_of(folder, model, family, scope, lora=None, **config):
    peft_config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": family.targets} | (lora or {})))
    settings = {"labels": make_ragged_labels(), "min_prob_ratio": FLOOR} | config
    return make_trainer(folder, model, adapter_scope=scope, peft_config=peft_config, **settings)


def random_trainer(folder, name, attn, scope, lora=None, **config):
    """With a random adapter, in training mode."""
    trainer = trainer_of(folder, make_model(name, attn), (FAMILIES | REFUSED)[name], scope, lora, **config)
    randomise(trainer)
    trainer.model.train()
    return trainer


def naive_of(trainer, name):
    """The reference on the trainer's own parameters."""
    selector = LocalSelector(trainer.model, trainer.selector_config(), trainer.adapter_name)
    return NaiveCausalLM(make_model(name, "eager"), selector)


def above_the_floor(row):
    """For each point its candidates that compete, and the index of the teacher's favourite."""
    for n, position in enumerate(row["positions"]):
        best = max(row["student_logprobs"][n])
        keep = [
            k for k, logprob in enumerate(row["student_logprobs"][n]) if logprob >= best + torch.tensor(FLOOR).log()
        ]
        target = max(keep, key=lambda k: row["teacher_logprobs"][n][k])
        yield n, position, keep, keep.index(target)


def naive_scores(naive, row, scope):
    """Scores of the candidates of each point of a trajectory, and the index of the target."""
    adapted = {"candidate": "last", "sequence": "all"}[scope]
    for n, position, keep, target in above_the_floor(row):
        texts = [[*row["input_ids"][:position], row["candidate_ids"][n][k]] for k in keep]
        hidden_KD, _ = naive.run(texts, adapted)
        yield n, keep, (hidden_KD @ naive.rows_RD.T).softmax(-1) @ torch.linspace(0, 1, len(RESERVED)), target


def gradients(trainer):
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    return found


def check_scores_and_gradients(trainer, name):
    """Against the reference, for a batch of all trajectories."""
    scope = trainer.args.adapter_scope
    rows = trainer.train_dataset.to_list()
    loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
    loss.backward()
    got = gradients(trainer)

    naive, terms = naive_of(trainer, name), []
    expected_BNK = torch.zeros_like(outputs["scores"])
    for b, row in enumerate(rows):
        for n, keep, scores_K, target in naive_scores(naive, row, scope):
            expected_BNK[b, n, keep] = scores_K.detach()
            terms.append(-(scores_K / trainer.args.temperature).log_softmax(-1)[target])
    torch.stack(terms).mean().backward()
    torch.testing.assert_close(outputs["scores"], expected_BNK, atol=1e-4, rtol=0)
    assert float(expected_BNK[expected_BNK > 0].std()) > 0.02, "all candidates alike would show nothing"
    for parameter, expected in gradients(trainer).items():
        assert got[parameter] is not None, parameter
        torch.testing.assert_close(got[parameter], expected, atol=1e-4, rtol=1e-3, msg=lambda m, p=parameter: p + m)


@pytest.mark.parametrize(("name", "attn", "scope"), CASES)
def test_scores_and_gradients_of_a_batch_equal_one_forward_per_candidate(tmp_path, name, attn, scope):
    check_scores_and_gradients(random_trainer(tmp_path, name, attn, scope, prefix_kl_weight=0.0), name)


def test_a_recurrent_model_can_be_trained_in_layers_that_see_all_tokens_in_one_heap(tmp_path):
    lora = {"target_modules": ["q_proj", "in_proj_qkvz", "shared_expert_gate"]}
    trainer = random_trainer(tmp_path, "qwen3_next", "sdpa", "candidate", lora)
    check_scores_and_gradients(trainer, "qwen3_next")


@pytest.mark.parametrize("scope", PROPOSALS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_kernel_that_takes_no_tree_mask_gives_the_same_scores_and_gradients(tmp_path, name, scope):
    """As flash attention, under a name that the library does not know."""
    AttentionInterface.register("another_kernel", sdpa_attention_forward)
    AttentionMaskInterface.register("another_kernel", sdpa_mask)
    with pytest.warns(UserWarning, match="attention 'another_kernel'"):
        trainer = random_trainer(tmp_path, name, "another_kernel", scope, prefix_kl_weight=0.0)
    check_scores_and_gradients(trainer, name)


def test_lora_dropout_is_on_in_training_and_off_in_evaluation_where_whole_texts_are_run(tmp_path):
    trainer = random_trainer(tmp_path, "lfm2", "sdpa", "candidate", {"lora_dropout": 0.5})
    batch = trainer.data_collator(trainer.train_dataset.to_list())
    assert trainer.compute_loss(trainer.model, batch) != trainer.compute_loss(trainer.model, batch)
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize(("name", "scope"), in_turn(FAMILIES, PROPOSALS))
def test_a_saved_adapter_decodes_with_the_scores_of_training_and_evaluation(tmp_path, name, scope):
    """Each trajectory is written again, by a session whose student proposes the labelled candidates at each point."""
    attn = FAMILIES[name].impls[0]
    trainer = random_trainer(tmp_path, name, attn, scope, proposals=PROPOSALS[scope])
    rows = trainer.train_dataset.to_list()
    batch = trainer.data_collator(rows)
    scores_BNK = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["scores"]
    with torch.no_grad():  # another way through recurrent layers
        evaluated_BNK = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["scores"]
    torch.testing.assert_close(evaluated_BNK, scores_BNK, atol=1e-4, rtol=0)
    trainer.save_model()
    selector = LocalSelector.from_pretrained(tmp_path / "out", make_model(name, attn))
    config = S2TDecodingConfig(num_candidates=scores_BNK.shape[-1], min_prob_ratio=FLOOR, warmup_tokens=0)
    for row, scores_NK in zip(rows, scores_BNK):
        trace = S2TTrace()
        session = S2TSession(selector, config, row["prompt_length"], trace=trace)
        for n, position, keep, _ in above_the_floor(row):
            logits_BV = torch.full((1, VOCAB_SIZE), -1e4)
            logits_BV[0, row["candidate_ids"][n]] = torch.tensor(row["student_logprobs"][n])
            prefix_BT = torch.tensor([row["input_ids"][:position]])
            with torch.no_grad():
                session.step(prefix_BT, torch.ones_like(prefix_BT, dtype=torch.bool), logits_BV)
            got_K = trace.steps[-1]["scores_AK"][0]
            torch.testing.assert_close(got_K, scores_NK[n, keep], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prefix_kl_is_between_the_distributions_that_the_models_write_with(tmp_path, name):
    trainer = random_trainer(tmp_path, name, FAMILIES[name].impls[0], "sequence", prefix_kl_weight=1.0)
    rows = trainer.train_dataset.to_list()
    losses = []
    for trainer.args.prefix_kl_weight in (0.0, 1.0):
        losses.append(float(trainer.compute_loss(trainer.model, trainer.data_collator(rows))))
    naive, terms = naive_of(trainer, name), []
    text = [id for id in range(VOCAB_SIZE) if id not in RESERVED]
    for row in rows:
        base_TV, tuned_TV = (naive.run([row["input_ids"]], which)[1][0] for which in ("none", "all"))
        base_TV, tuned_TV = (logits_TV[:, text].log_softmax(-1) for logits_TV in (base_TV, tuned_TV))
        terms.append((base_TV.exp() * (base_TV - tuned_TV)).sum(-1))
    assert losses[1] - losses[0] == pytest.approx(float(torch.cat(terms).mean()), rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_without_a_tree_and_no_others_warn_of_what_training_costs(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_without_tree(make_model(name, FAMILIES[name].impls[0]))
    messages = [str(warning.message) for warning in caught if "packed candidates" in str(warning.message)]
    assert len(messages) == (name in REPEATED)
    recurrent = name in REPEATED - {"biogpt", "bloom", "gpt_neo", "llama4_text"}
    for message in messages:
        assert ("adapter_scope='candidate' and 'sequence' over" in message) == recurrent
        assert "times slower as a trajectory has candidates" in message


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("rwkv", {"attention_hidden_size": 32}),
        ("xlstm", {"num_blocks": 2, "num_heads": 4}),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"]}),
    ],
)
def test_a_model_without_a_cache_that_candidates_could_share_is_refused_before_training(tmp_path, name, config):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(COMMON | config)))
    with pytest.raises(ValueError, match="takes no cache"):
        trainer_of(tmp_path, model, FAMILIES["llama"], "sequence")


@pytest.mark.parametrize("scope", PROPOSALS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_keeps_its_state_outside_of_the_cache_is_refused_at_the_first_step(tmp_path, name, scope):
    trainer = random_trainer(tmp_path, name, "sdpa", scope)
    with pytest.raises(ValueError, match="outside of the cache"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "lora"),
    [("lfm2", {"use_dora": True}), ("qwen3_next", {"target_modules": "all-linear"})],  # PEFT counts experts as linear
)
def test_adapters_that_cannot_be_split_are_refused_in_recurrent_models_with_what_to_do(tmp_path, name, lora):
    trainer = random_trainer(tmp_path, name, "sdpa", "candidate", lora)
    with pytest.raises(ValueError, match="adapter_scope='sequence'"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        pytest.param("jamba", "candidate", marks=pytest.mark.slow),
        ("lfm2", "sequence"),
        pytest.param("gpt_neo", "candidate", marks=pytest.mark.slow),
    ],
)
def test_a_model_without_a_tree_learns(tmp_path, name, scope):
    model = make_model(name, FAMILIES[name].impls[0])
    settings = {"labels": make_labels(8), "max_steps": 30, "logging_steps": 1, "learning_rate": 2e-2}
    trainer = trainer_of(tmp_path, model, FAMILIES[name], scope, per_device_train_batch_size=2, **settings)
    trainer.train()
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses) == 30 and bool(losses.isfinite().all())
    assert float(losses[-4:].mean()) < 0.7 * float(losses[:4].mean())
