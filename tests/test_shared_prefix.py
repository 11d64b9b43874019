"""What the rows of a batch begin with is read once: nothing that is written, scored or trained changes by it.

Legend: B rows, T columns.
"""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_labeling import HEADER, assert_same_rows, rows_of
from tiny import EOS, PAD, RESERVED, SETUPS, disagreeing_pair, make_selector, tiny_model
from tiny_architectures import FAMILIES, make_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, ModernBertDecoderConfig, RobertaConfig
from transformers.cache_utils import DynamicLayer

from transformers_s2t import S2TDecodingConfig, S2TTrace, TeacherSelector, s2t_generate
from transformers_s2t.labeling import rollout as rollout_module
from transformers_s2t.labeling.label_problems import label_problems
from transformers_s2t.labeling.points import score_trajectories
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.models import shared_prefix
from transformers_s2t.models.forwards import logits_from
from transformers_s2t.models.shared_prefix import (
    can_share,
    is_random,
    pad_prompts,
    positions_from_mask,
    read_prompts,
    read_shared,
    share_in_forward,
    shared_columns,
    shared_length,
)
from transformers_s2t.models.views import ModelViews
from transformers_s2t.scoring.candidates import PrefixCache
from transformers_s2t.scoring.packing import PackedPoints, packed_hidden


SYSTEM = [5, 17, 40, 8, 23, 11, 60, 31, 9, 77]
PROMPTS = [SYSTEM + own for own in ([4, 8], [50], [33, 12, 9, 41, 7], [61, 62, 3])]


class CountTokens:
    """How many tokens go through a model's decoder."""

    def __init__(self, *models):
        self.tokens = 0
        self.handles = [model.model.register_forward_pre_hook(self._count, with_kwargs=True) for model in models]

    def _count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def nothing_shared(monkeypatch):
    """Switches sharing off."""
    return lambda: monkeypatch.setattr(shared_prefix, "MIN_SHARED", 1 << 30)


def test_rows_begin_with_what_they_share_and_padding_follows():
    inputs = pad_prompts(PROMPTS, PAD, [tiny_model()])
    assert inputs["input_ids"].tolist()[1] == [*SYSTEM, PAD, PAD, PAD, PAD, 50]
    assert inputs["attention_mask"].tolist()[1] == [1] * 10 + [0] * 4 + [1]
    assert shared_columns(inputs["input_ids"], inputs["attention_mask"]) == len(SYSTEM) == shared_length(PROMPTS)


def test_without_a_model_all_padding_is_on_the_left():
    padded = pad_prompts([[5, 6, 7], [8]], PAD)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_prompts(PROMPTS, PAD)["input_ids"].tolist()[1] == [PAD] * 4 + [*SYSTEM, 50]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([SYSTEM, SYSTEM], 9),  # each keeps a token of its own
        ([SYSTEM, SYSTEM[:9]], 8),
        ([SYSTEM, SYSTEM[:8]], 0),  # seven are too few
        ([SYSTEM], 0),
        ([SYSTEM, [1, *SYSTEM[1:]]], 0),
    ],
)
def test_length_of_what_is_shared(rows, length):
    assert shared_length(rows) == length


def test_a_column_of_padding_ends_what_is_shared():
    inputs = pad_prompts([SYSTEM, SYSTEM[:9]], SYSTEM[0])
    assert shared_columns(inputs["input_ids"], inputs["attention_mask"]) == 0


def test_one_forward_of_one_row_fills_the_cache():
    model, inputs = tiny_model(), pad_prompts(PROMPTS, PAD, [tiny_model()])
    with CountTokens(model) as count:
        cache = read_shared(model, **inputs)
    assert count.tokens == len(SYSTEM) == cache.get_seq_length()
    assert {len(layer.keys) for layer in cache.layers} == {len(PROMPTS)}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_only_full_attention_shares_and_the_logits_are_the_same(name, nothing_shared):
    """Windows and states would see the padding; a wrong list of architectures shows here."""
    model = make_model(name, FAMILIES[name].impls[0])
    expected = rollout(model, PROMPTS, 6, PAD, [EOS])
    inputs = pad_prompts(PROMPTS, PAD, [model])
    shares = can_share(model)
    assert (inputs["attention_mask"][1, 0] == 1).item() is shares
    if shares:
        with torch.no_grad():
            rows = [torch.tensor([ids]) for ids in PROMPTS]
            alone = torch.cat([model(row).logits[:, -1] for row in rows])
            cache = read_shared(model, **inputs)
            own = inputs["input_ids"][:, cache.get_seq_length() :]
            positions = positions_from_mask(inputs["attention_mask"])[:, cache.get_seq_length() :]
            mask = inputs["attention_mask"]
            output = model(input_ids=own, attention_mask=mask, position_ids=positions, past_key_values=cache)
        torch.testing.assert_close(output.logits[:, -1], alone, rtol=1e-4, atol=1e-5)
    nothing_shared()
    assert rollout(model, PROMPTS, 6, PAD, [EOS]) == expected


def test_some_architectures_share_and_some_do_not():
    shares = {name: can_share(make_model(name, FAMILIES[name].impls[0])) for name in FAMILIES}
    assert {shares[name] for name in shares} == {True, False}
    assert not can_share(tiny_model("mistral", sliding_window=4))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_selectors_decode_the_same(setup, nothing_shared):
    model = tiny_model()
    selector = TeacherSelector(tiny_model(seed=9)) if setup == "teacher" else make_selector(model, *setup)
    config = S2TDecodingConfig(trigger="always", min_prob_ratio=0.0, warmup_tokens=0)
    settings = {"custom_generate": s2t_generate, "selector": selector, "decoding_config": config}
    models = [model, *filter(None, [getattr(selector, "teacher_model", None)])]
    expected = rollout(model, PROMPTS, 8, PAD, [EOS], decode_with=settings)  # scorers are tried out once, not counted
    with CountTokens(*models) as shared:
        assert rollout(model, PROMPTS, 8, PAD, [EOS], decode_with=settings) == expected
    nothing_shared()
    with CountTokens(*models) as apart:
        assert rollout(model, PROMPTS, 8, PAD, [EOS], decode_with=settings) == expected
    assert expected != rollout(model, PROMPTS, 8, PAD, [EOS])
    readers = 1 if setup in (("candidate", "base"), ("sequence", "adapted")) else 2
    assert apart.tokens - shared.tokens >= readers * 3 * len(SYSTEM)


def test_a_cache_of_the_users_own_is_filled():
    model, cache = tiny_model(), DynamicCache()
    inputs = pad_prompts(PROMPTS, PAD, [model])
    settings = {"custom_generate": s2t_generate, "selector": make_selector(model, "candidate", "base")}
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False, **settings)
    assert cache.get_seq_length() == ids.shape[1] - 1


def test_labels_are_the_same(tmp_path, nothing_shared):
    pair = disagreeing_pair()
    prompts = {f"p{i}": ids for i, ids in enumerate(PROMPTS)}
    settings = {"pad_token_id": PAD, "batch_size": 4, "shard_size": 4, "show_progress": False}
    for header, name in ((HEADER, "greedy"), (replace(HEADER, rollout="sample", num_rollouts=2), "sample")):
        with CountTokens(*pair) as shared:
            label_problems(*pair, prompts, tmp_path / name, header, **settings)
    nothing_shared()
    for header, name in ((HEADER, "greedy"), (replace(HEADER, rollout="sample", num_rollouts=2), "sample")):
        with CountTokens(*pair) as apart:
            label_problems(*pair, prompts, tmp_path / f"{name}-apart", header, **settings)
        assert_same_rows(rows_of(tmp_path / name), rows_of(tmp_path / f"{name}-apart"))
    assert shared.tokens < apart.tokens - 3 * 2 * 3 * len(SYSTEM) + 1


def test_gradients_go_through_everything():
    model = tiny_model()
    logits_from(model, PROMPTS, 11 - 1).sum().backward()
    assert model.get_input_embeddings().weight.grad[SYSTEM[0]].abs().sum() > 0


@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_training_scores_and_gradients_are_the_same(scope, nothing_shared):
    model = tiny_model()
    selector = make_selector(model, scope, "base")
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for weight in weights.values():
        weight.requires_grad_(True)
    rows = [[*ids, 9, 44, 15] for ids in PROMPTS]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask_BT = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    positions_BN = torch.tensor([[len(row) - 3, len(row) - 1] for row in rows])
    candidates_BNK = torch.randint(3, 80, (4, 2, 3), generator=torch.Generator().manual_seed(0))
    points = PackedPoints(positions_BN, candidates_BNK, torch.ones(4, 2, 3, dtype=torch.bool))

    def run():
        with CountTokens(model) as count:
            hidden, text = packed_hidden(ModelViews(model, selector.adapter_name), ids_BT, mask_BT, points, scope)
        loss = (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum()  # behind a norm, squares sum up to a constant
        loss = loss if text is None else loss + text[mask_BT][:, :7].sum()
        grads = torch.autograd.grad(loss, list(weights.values()))
        return hidden, text, grads, count.tokens

    shared_BMD, shared_text, shared_grads, few = run()
    nothing_shared()
    apart_BMD, apart_text, apart_grads, all_of_them = run()
    assert all_of_them - few == 3 * len(SYSTEM)
    assert (shared_text is None) == (scope == "candidate")
    torch.testing.assert_close(shared_BMD, apart_BMD, rtol=1e-5, atol=1e-5)
    if shared_text is not None:
        torch.testing.assert_close(shared_text[mask_BT], apart_text[mask_BT], rtol=1e-5, atol=1e-5)
    for one, other in zip(shared_grads, apart_grads, strict=True):
        assert other.abs().sum() > 0
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_have_ended_leave_the_batch(sampled, monkeypatch):
    """Texts of 20 rows, which end at different places, are those of each row alone; fewer rows run."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    many = [[*SYSTEM, *torch.randint(3, 80, (1 + i % 5,), generator=generator).tolist()] for i in range(20)]
    ends = [EOS, *range(20, 32)]
    settings = {"do_sample": sampled, "suppressed_ids": RESERVED}
    with CountTokens(model) as shrinking:
        together = rollout(model, many, 16, PAD, ends, **settings)
    assert len(set(map(len, together))) > 3
    assert together == [rollout(model, [ids], 16, PAD, ends, **settings)[0] for ids in many]
    monkeypatch.setattr(rollout_module, "_FEW_ROWS", 1 << 30)
    with CountTokens(model) as whole:
        assert rollout(model, many, 16, PAD, ends, **settings) == together
    assert shrinking.tokens < 0.8 * whole.tokens


def test_the_cache_of_a_prefix_counts_what_it_holds():
    model = tiny_model()
    prefix, inputs = PrefixCache(model), pad_prompts(PROMPTS, PAD, [model])
    prefix.feed(inputs["input_ids"], inputs["attention_mask"].bool())
    assert prefix.num_cached == inputs["input_ids"].shape[1] == prefix.cache.get_seq_length()


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8]]], ids=["shared", "nothing shared"])
def test_several_samples_go_on_from_one_reading_of_their_prompt(prompts):
    model = tiny_model()
    inputs = pad_prompts(prompts, PAD, [model])
    settings = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": PAD, "output_logits": True}
    torch.manual_seed(3)
    expected = model.generate(**inputs, num_return_sequences=3, return_dict_in_generate=True, **settings)
    with CountTokens(model) as count:
        cache = read_prompts(model, **inputs, num_copies=3)
    shared = shared_length(prompts)
    assert count.tokens == shared + (inputs["input_ids"].shape[1] - 1 - shared) * len(prompts)
    copies = {name: rows_BT.repeat_interleave(3, 0) for name, rows_BT in inputs.items()}
    torch.manual_seed(3)
    found = model.generate(**copies, past_key_values=cache, return_dict_in_generate=True, **settings)
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.logits[0], expected.logits[0], rtol=1e-4, atol=1e-5)


def lora(model):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
    torch.manual_seed(0)
    return get_peft_model(model, config)


def test_a_training_forward_shares_and_its_gradients_are_the_same():
    rows = [[*ids, 9, 44, 15] for ids in PROMPTS]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        "attention_mask": (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long(),
    }
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = [lora(tiny_model()) for _ in range(2)]
    share_in_forward(models[1].get_base_model())
    tokens = []
    for model in models:
        layer = model.get_base_model().model.layers[0]
        layer.register_forward_pre_hook(lambda module, args: tokens.append(args[0][..., 0].numel()))
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    assert tokens == [width * 4, len(SYSTEM), (width - len(SYSTEM)) * 4]
    grads = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert len(grads[0]) > 10 and all(grad.abs().sum() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_training_forward_with_dropout_or_a_cache_is_left_alone():
    model = tiny_model()
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)).train()
    share_in_forward(model)
    ids_BT = torch.tensor([[*SYSTEM, 9], [*SYSTEM, 15]])
    tokens = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    peft_model(**inputs, use_cache=False)
    peft_model.eval()(**inputs, use_cache=False)
    assert tokens == [11, 10, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Models that cannot share, or not everything


def alone_and_together(model, rows, first):
    """Logits of the last token of each row: of the row alone, and of `logits_from` over all of them."""
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        together = logits_from(model, rows, first)
    last = [len(row) - 1 - first for row in rows]
    return alone, torch.stack([together[b, t] for b, t in enumerate(last)])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_positions_that_change_with_the_length_are_not_shared(rope_type):
    settings = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 12}
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, rope_parameters=settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share(model) and can_share(tiny_model())
    alone, together = alone_and_together(model, [PROMPTS[2], [*SYSTEM, 4, 8, 19, 6, 2]], 10)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_model_that_numbers_its_tokens_itself_reads_the_same():
    """RoBERTa begins behind its padding id."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        is_decoder=True, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    alone, together = alone_and_together(model, PROMPTS, 10)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_teacher_of_a_trigger_reads_the_text_too():
    """A teacher with windows must not read padding between the shared tokens and the others."""
    model, teacher = tiny_model(), tiny_model("mistral", seed=9, sliding_window=6)
    values = {}
    for prompts in (PROMPTS, *([one] for one in PROMPTS)):
        trace = S2TTrace()
        config = S2TDecodingConfig(trigger="kl", threshold=1e9, warmup_tokens=0)
        settings = {"custom_generate": s2t_generate, "selector": make_selector(model, "candidate", "base")}
        settings |= {"decoding_config": config, "teacher_model": teacher, "trace": trace}
        rollout(model, prompts, 4, PAD, decode_with=settings)
        values[len(values)] = torch.stack([step["value_B"] for step in trace.steps], dim=1)
    together, *alone = values.values()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["student", "teacher"])
def test_a_peft_model_is_scored_and_writes_with_its_adapter(wrapped):
    models = {"student": tiny_model(), "teacher": tiny_model(seed=9)}
    expected = score_trajectories(*models.values(), PROMPTS, [len(ids) - 1 for ids in PROMPTS], 5)
    models[wrapped] = lora(models[wrapped]).eval()
    found = score_trajectories(*models.values(), PROMPTS, [len(ids) - 1 for ids in PROMPTS], 5)
    merged = copy.deepcopy(models[wrapped]).merge_and_unload()
    models_merged = models | {wrapped: merged}
    again = score_trajectories(*models_merged.values(), PROMPTS, [len(ids) - 1 for ids in PROMPTS], 5)
    for one, other, before in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one.divergence_S, other.divergence_S, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one.divergence_S, before.divergence_S)
    assert rollout(models[wrapped], PROMPTS, 6, PAD) == rollout(merged, PROMPTS, 6, PAD)


def test_a_head_that_takes_its_shapes_from_the_ids_is_scored():
    torch.manual_seed(0)
    config = ModernBertDecoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = [len(ids) - 1 for ids in PROMPTS]
    for ids, scores in zip(PROMPTS, score_trajectories(model, tiny_model(), PROMPTS, lengths, 5), strict=True):
        with torch.no_grad():
            logp_V = model(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores.student_logprobs_SK[0], logp_V.topk(5).values, rtol=1e-4, atol=1e-4)


def test_checkpointed_layers_leave_caches_alone_and_train_on_the_whole_text(nothing_shared):
    rows = [[*ids, 9, 44, 15] for ids in PROMPTS]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask_BT = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    points = PackedPoints(
        torch.tensor([[len(row) - 2] for row in rows]), ids_BT[:, None, :3], torch.ones(4, 1, 3, dtype=torch.bool)
    )
    model = tiny_model().train()
    selector = make_selector(model, "sequence", "base")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found, text = packed_hidden(ModelViews(model, selector.adapter_name), ids_BT, mask_BT, points, "sequence")
    nothing_shared()
    expected, all_text = packed_hidden(ModelViews(model, selector.adapter_name), ids_BT, mask_BT, points, "sequence")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text[mask_BT], all_text[mask_BT], rtol=1e-5, atol=1e-5)


def test_what_is_random_is_drawn_for_each_row():
    model = tiny_model()
    assert not is_random(model.train())
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert is_random(model) and not is_random(model.eval())


def test_a_training_forward_that_gives_a_cache_gives_all_of_it():
    model, ids_BT = tiny_model(), torch.tensor([[*SYSTEM, 9], [*SYSTEM, 15]])
    share_in_forward(model)
    output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
    assert output.past_key_values.get_seq_length() == 11


def test_rows_stay_where_the_model_knows_them_by_their_place():
    """Qwen2-VL keeps an offset of positions for each row of the batch."""
    model = tiny_model()
    many = [[*SYSTEM, 4 + i] for i in range(20)]
    with CountTokens(model) as shrinking:
        expected = rollout(model, many, 12, PAD, [0, *range(20, 40)])
    model.model.rope_deltas = None
    with CountTokens(model) as whole:
        assert rollout(model, many, 12, PAD, [0, *range(20, 40)]) == expected
    assert shrinking.tokens < whole.tokens


def test_a_cache_of_the_users_own_kind_is_left_to_the_model():
    class Counting(DynamicLayer):
        updates = 0

        def update(self, *args, **kwargs):
            Counting.updates += 1
            return super().update(*args, **kwargs)

    model = tiny_model()
    cache = DynamicCache(config=model.config)
    cache.layers = [Counting() for _ in cache.layers]
    inputs = pad_prompts(PROMPTS, PAD, [model])
    settings = {"custom_generate": s2t_generate, "selector": make_selector(model, "candidate", "base")}
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False, **settings)
    assert Counting.updates >= 2 and {type(layer) for layer in cache.layers} == {Counting}
