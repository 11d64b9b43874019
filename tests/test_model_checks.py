"""Every kind of model is exact against a forward of the whole text at every step, or refused before the first token.

Both as teacher and as student, in both ways into `generate`: "processor" is `logits_processor=S2T(...)`, "loop" is
`custom_generate=s2t_generate`.
"""

import warnings

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import (
    BOS,
    EOS,
    NEVER_FINISHES,
    PAD,
    SETTINGS,
    VOCAB_SIZE,
    WAYS,
    make_selector,
    offer_all,
    prompts,
    single,
    tiny_model,
)
from tiny_labels import make_labels, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.generation import BaseStreamer

from transformers_s2t import (
    S2T,
    LocalSelector,
    S2TConfig,
    S2TTrace,
    S2TTrainer,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)
from transformers_s2t.decoding.logits_process import S2TLogitsProcessor
from transformers_s2t.labeling.points import score_trajectories
from transformers_s2t.labeling.teachers import LocalTeacher
from transformers_s2t.model_checks import (
    check_causal_lm,
    check_reads_in_parts,
    check_reads_left_to_right,
    context_length,
    position_rows,
)


NEW_TOKENS, K = 8, 5
IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SEQ2SEQ = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": PAD}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": PAD}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
GPT |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
OPT = SETTINGS | {"ffn_dim": 48, "init_std": 0.3, "dropout": 0.0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
IMAGE = VOCAB_SIZE - 1


def build(auto, family, **config):
    torch.manual_seed(9)
    model = auto.from_config(AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that what is wrong is very wrong
            parameter += 0.15 * torch.randn(parameter.shape)
    return model


def causal(family, **config):
    return build(AutoModelForCausalLM, family, **(SETTINGS | config))


def image_text(family, text, vision, **config):
    text = SETTINGS | {"model_type": text}
    return build(AutoModelForImageTextToText, family, text_config=text, vision_config=VISION | vision, **config)


def peft_model(config, base=None):
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(seed=9) if base is None else base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape)
    return model


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, **settings)


VIRTUAL = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "multitask": lambda: MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2),
    "cpt": lambda: CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
}
#: kind -> how it is made, and what the error says
WRONG = {name: (lambda make=make: peft_model(make()), "virtual tokens") for name, make in VIRTUAL.items()}
WRONG |= {
    "activated LoRA": (lambda: peft_model(lora(alora_invocation_tokens=[5])), "activated LoRA"),
    "T5": (lambda: build(AutoModelForSeq2SeqLM, "t5", **IDS, **SEQ2SEQ), "encoder-decoder"),
    "BART": (lambda: build(AutoModelForSeq2SeqLM, "bart", **IDS, **BART), "encoder-decoder"),
    "BART's decoder": (lambda: build(AutoModelForCausalLM, "bart", **IDS, **BART), "takes no cache"),
    "BERT": (lambda: causal("bert"), "it is an encoder"),
    "headless": (lambda: build(AutoModel, "llama", **SETTINGS), "no language head"),
    "headless GPT-2": (lambda: build(AutoModel, "gpt2", **IDS, **GPT), "no language head"),
    "classifier": (lambda: build(AutoModelForSequenceClassification, "llama", **SETTINGS), "no language head"),
    "meta": (lambda: tiny_model().to("meta"), "meta device"),
    "dropout": (lambda: tiny_model(seed=9, attention_dropout=0.1).train(), r"training mode.*attention_dropout"),
    "LoRA dropout": (lambda: peft_model(lora(lora_dropout=0.1)).train(), r"training mode.*lora_dropout"),
    "XLNet": (
        lambda: build(
            AutoModelForCausalLM, "xlnet", vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=4, d_inner=48
        ),
        "takes no cache",
    ),
    "RoBERTa": (lambda: causal("roberta", is_decoder=True), "in parts"),  # counts positions from 2
    "PaliGemma": (
        lambda: image_text(
            "paligemma",
            "gemma",
            {"model_type": "siglip_vision_model", "projection_dim": 32},
            image_token_index=IMAGE,
            projection_dim=32,
        ),
        "in parts",
    ),
}
RIGHT = {
    "LoRA": lambda: peft_model(lora()),
    "IA3": lambda: peft_model(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        )
    ),
    "adaption prompt": lambda: peft_model(
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    ),
    "BERT as a decoder": lambda: causal("bert", is_decoder=True),
    "CTRL": lambda: build(AutoModelForCausalLM, "ctrl", **IDS, **GPT, n_positions=64, dff=48),
    "LLaVA": lambda: image_text("llava", "llama", {"model_type": "clip_vision_model"}, image_token_index=IMAGE),
    "another number of rows": lambda: tiny_model(seed=9, vocab_size=VOCAB_SIZE + 7),
}


def generate(way, model, inputs, selector=None, config=None, trace=None, teacher=None, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | NEVER_FINISHES | kwargs
    config = offer_all(warmup_tokens=0) if config is None else config
    if way == "processor":
        select = S2T(selector, teacher_model=teacher, config=config, trace=trace)
        return model.generate(**inputs, logits_processor=select, **kwargs)
    settings = {"selector": selector, "teacher_model": teacher, "decoding_config": config, "trace": trace}
    return model.generate(**inputs, custom_generate=s2t_generate, **settings, **kwargs)


class FirstToken(BaseStreamer):
    """Nothing but the prompt may come."""

    def __init__(self):
        self.columns = 0

    def put(self, value):
        self.columns += 1

    def end(self):
        pass


def refused(message, way, model, inputs, *args, **kwargs):
    streamer = FirstToken()
    with pytest.raises(ValueError, match=message):
        generate(way, model, inputs, *args, streamer=streamer, **kwargs)
    assert streamer.columns <= 1, "a token came before the error"


def next_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


def naive(student, teacher, ids, num_new=NEW_TOKENS):
    """New tokens of one row: a forward of the whole text for every step of each model."""
    length = ids.shape[1]
    for _ in range(num_new):
        offered_K = next_logits(student, ids).topk(K).indices
        best = next_logits(teacher, ids)[offered_K].argmax()
        ids = torch.cat([ids, offered_K[best].view(1, 1)], dim=1)
    return ids[0, length:].tolist()


def assert_exact(way, student, teacher, inputs):
    trace = S2TTrace()
    output = generate(way, student, inputs, teacher=teacher, trace=trace)
    rows = range(len(inputs["input_ids"]))
    expected = [naive(student, teacher, single(inputs, row)["input_ids"]) for row in rows]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert sum(step["flipped"] for row in trace.rows() for step in row) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_teacher_of_a_wrong_kind_is_refused(kind, way):
    make, message = WRONG[kind]
    teacher = make()
    training = teacher.training
    refused(f"(?s)`teacher_model`.*{message}", way, tiny_model(), single(prompts(), 0), teacher=teacher)
    assert teacher.training is training


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_of_a_wrong_kind_is_refused_as_an_oracle(way):
    """The "kl" trigger's teacher stands beside the selector."""
    model = tiny_model()
    selector = make_selector(model)
    for kind in ("prompt tuning", "BERT", "PaliGemma"):
        make, message = WRONG[kind]
        config = offer_all(trigger="kl", threshold=0.1)
        refused(f"(?s)`teacher_model`.*{message}", way, model, prompts(), selector, config, teacher=make())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", RIGHT)
def test_a_teacher_of_a_right_kind_is_exact(kind, way):
    assert_exact(way, tiny_model(), RIGHT[kind](), prompts())


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_counts_padding_is_refused_beside_padding_only(way):
    """RoFormer takes no positions: it counts columns."""
    teacher = causal("roformer", is_decoder=True, embedding_size=32)
    assert_exact(way, tiny_model(), teacher, single(prompts(), 1))
    refused("`teacher_model`.*beside padding", way, tiny_model(), prompts(), teacher=teacher)


def test_a_model_is_tried_once():
    teacher, calls = tiny_model(seed=9), []
    teacher.model.register_forward_hook(lambda *call: calls.append(1))
    check_reads_in_parts("teacher_model", teacher, is_padded=True)
    num_tried = len(calls)
    assert 0 < num_tried <= 8
    check_reads_in_parts("teacher_model", teacher, is_padded=True)
    assert len(calls) == num_tried


def test_the_generator_of_random_numbers_is_left_alone():
    teacher = tiny_model(seed=9)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_reads_in_parts("teacher_model", teacher, is_padded=True)
    check_reads_left_to_right("teacher_model", teacher)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe"])
def test_rounding_is_no_fault(dtype, family):
    """Random weights of such a spread round worse than any trained model."""
    experts = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
    model = causal(family, **(experts if "moe" in family else {})).to(dtype)
    check_reads_in_parts("teacher_model", model, is_padded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Students


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["T5", "BART", "BERT", "dropout"])
def test_a_student_of_a_wrong_kind_is_refused(kind, way):
    make, message = WRONG[kind]
    refused(f"(?s)`model`.*{message}", way, make(), single(prompts(), 0), teacher=tiny_model(seed=9))


@pytest.mark.parametrize("kind", [*VIRTUAL, "T5", "BART", "BERT", "headless", "classifier", "meta"])
def test_a_local_selector_in_a_model_of_a_wrong_kind_is_refused(kind, tmp_path):
    make, message = WRONG[kind]
    config = SelectorConfig(tuple(range(81, 97)))
    with pytest.raises(ValueError, match=f"(?s)`model`.*{message}"):
        LocalSelector(make(), config, "s2t")
    config.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"(?s)`model`.*{message}"):
        LocalSelector.from_pretrained(tmp_path, make())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", [("candidate", "base"), ("sequence", "base")], ids="-".join)
def test_a_local_selector_in_a_model_that_was_given_virtual_tokens_later_is_refused(scope, way):
    """The selector scores without them, and would not know."""
    model = tiny_model()
    selector = make_selector(model, *scope)
    around = get_peft_model(selector.model, VIRTUAL["prompt tuning"](), adapter_name="prompt").eval()
    refused("`model` has virtual tokens", way, around, single(prompts(), 0), selector)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning", "p-tuning", "cpt"])
def test_a_student_with_virtual_tokens_is_exact_under_a_teacher(kind, way):
    """`generate` puts them before the prompt, once."""
    student = peft_model(VIRTUAL[kind](), tiny_model())
    assert_exact(way, student, tiny_model(seed=9), single(prompts(), 0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["LLaVA", "CTRL", "LoRA"])
def test_a_student_of_a_right_kind_is_exact(kind, way):
    assert_exact(way, RIGHT[kind](), tiny_model(seed=4), prompts())


# ---------------------------------------------------------------------------------------------------------------------
# Lengths

ROWS = 12
#: models with a table of positions: family -> its config for ROWS positions
TABLES = {
    "gpt2": IDS | GPT | {"n_positions": ROWS},
    "gpt_bigcode": IDS | GPT | {"n_positions": ROWS},
    "gptj": IDS | GPT | {"n_positions": ROWS, "rotary_dim": 8},
    "codegen": IDS | GPT | {"n_positions": ROWS, "rotary_dim": 8},
    "ctrl": IDS | GPT | {"n_positions": ROWS, "dff": 48},
    "opt": OPT | {"max_position_embeddings": ROWS},
    "biogpt": SETTINGS | {"max_position_embeddings": ROWS},
    "bert": SETTINGS | {"max_position_embeddings": ROWS, "is_decoder": True},
    "mbart": IDS | BART | {"max_position_embeddings": ROWS},
}


@pytest.mark.parametrize("family", TABLES)
def test_the_rows_of_a_table_are_the_positions_that_a_model_reads(family):
    """OPT and BART have two rows more than they have positions."""
    model = build(AutoModelForCausalLM, family, **TABLES[family])
    assert position_rows(model) == context_length(model) == ROWS
    model(input_ids=torch.full((1, ROWS), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, ROWS + 1), 5), use_cache=False)


def test_rows_are_counted_in_the_weights():
    model = build(AutoModelForCausalLM, "gpt2", **TABLES["gpt2"])
    model.config.n_positions = 1024
    assert position_rows(model) == context_length(model) == ROWS
    assert position_rows(peft_model(lora(), model)) == ROWS
    for other in (tiny_model(), causal("bloom", n_layer=2, n_head=4)):
        assert position_rows(other) is None
    assert context_length(tiny_model(max_position_embeddings=17)) == 17
    llava = RIGHT["LLaVA"]()  # its vision tower has a table
    assert position_rows(llava) is None and context_length(llava) == SETTINGS["max_position_embeddings"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_a_text_that_passes_the_teachers_table_is_refused(family, way):
    """In the middle of the text it was an IndexError without a name."""
    teacher = build(AutoModelForCausalLM, family, **TABLES[family])
    model, inputs = tiny_model(), prompts()
    most = ROWS - inputs["input_ids"].shape[1] + 1  # nobody reads the last token
    message = f"`max_new_tokens` must be at most {most}: .*`teacher_model` has position embeddings for {ROWS}"
    refused(message, way, model, inputs, teacher=teacher, max_new_tokens=most + 1)
    output = generate(way, model, inputs, teacher=teacher, max_new_tokens=most)
    expected = [naive(model, teacher, single(inputs, row)["input_ids"], most) for row in range(3)]
    assert output[:, -most:].tolist() == expected


@pytest.mark.parametrize("way", WAYS)
def test_padding_takes_no_row(way):
    """12 columns and 5 new ones, of which no row fills more than 12."""
    teacher = build(AutoModelForCausalLM, "gpt2", **TABLES["gpt2"])
    inputs = {name: tensor[:-1] for name, tensor in prompts((7, 4, ROWS)).items()}
    assert generate(way, tiny_model(), inputs, teacher=teacher, max_new_tokens=5).shape[1] == ROWS + 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("selects", ["teacher", "local"])
def test_a_text_that_passes_the_students_table_is_refused(selects, way):
    """A candidate after the last token but one takes a row too, where the student scores it."""
    model, inputs = build(AutoModelForCausalLM, "gpt2", **TABLES["gpt2"]), prompts()
    most = ROWS - inputs["input_ids"].shape[1] + (selects == "teacher")
    selector = TeacherSelector(tiny_model(seed=9)) if selects == "teacher" else make_selector(model)
    message = f"`max_new_tokens` must be at most {most}: .*`model` has position embeddings for {ROWS}"
    refused(message, way, model, inputs, selector, max_new_tokens=most + 1)
    assert generate(way, model, inputs, selector, max_new_tokens=most).shape[1] == 7 + most


@pytest.mark.parametrize("way", WAYS)
def test_a_rotary_model_is_warned_of_once(way):
    """It goes on, and the text may end long before."""
    model, teacher = tiny_model(), tiny_model(seed=9, max_position_embeddings=10)
    inputs = prompts()
    with pytest.warns(UserWarning, match="`max_new_tokens` is 8, but `teacher_model` was made for 10"):
        output = generate(way, model, inputs, teacher=teacher)
    assert output[:, 7:].tolist() == [naive(model, teacher, single(inputs, row)["input_ids"]) for row in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(way, model, inputs, teacher=teacher)
        generate(way, model, inputs, teacher=tiny_model(seed=9, max_position_embeddings=14))


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 4}
    | {"long_factor": [4.0] * 4},
}


def with_rope(kind):
    """A model whose rotary positions change beyond ROWS tokens."""
    if kind == "dynamic":
        return causal("llama", max_position_embeddings=ROWS, rope_parameters=ROPES[kind])
    lengths = {"max_position_embeddings": 4 * ROWS, "original_max_position_embeddings": ROWS}
    return causal("phi3", rope_parameters=ROPES[kind], **lengths)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ROPES)
def test_a_text_that_changes_a_scorers_rotary_positions_is_refused(kind, way):
    """Beyond that length, the keys in the cache are rotated otherwise than those of the whole text: by nats."""
    model, teacher, inputs = tiny_model(), with_rope(kind), prompts()
    most = ROWS - 7 + 1
    message = f"at most {most}: .*`teacher_model` gives all tokens other rotary positions beyond {ROWS}.*{kind}"
    refused(message, way, model, inputs, teacher=teacher, max_new_tokens=most + 1)
    output = generate(way, model, inputs, teacher=teacher, max_new_tokens=most)
    expected = [naive(model, teacher, single(inputs, row)["input_ids"], most) for row in range(3)]
    assert output[:, -most:].tolist() == expected
    local = with_rope(kind)
    message = f"at most {most - 1}: .*`model` gives all tokens other rotary positions"
    refused(message, way, local, inputs, make_selector(local), max_new_tokens=most)


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_beyond_the_change_of_rotary_positions_is_exact(way):
    """Where all rows are: a shorter row's cache would be of both kinds."""
    model, teacher = tiny_model(), with_rope("longrope")
    assert_exact(way, model, teacher, prompts((ROWS + 1, ROWS + 4)))
    message = "must be at most 0.*other rotary positions"
    refused(message, way, model, prompts((ROWS + 1, ROWS)), teacher=teacher)


def test_a_processor_called_by_hand_says_where_a_table_ends():
    """There nobody has said how many tokens will follow."""
    teacher = build(AutoModelForCausalLM, "gpt2", **TABLES["gpt2"])
    model, ids = tiny_model(), single(prompts(), 0)["input_ids"]
    processor = S2TLogitsProcessor(teacher_model=teacher, config=offer_all(warmup_tokens=0))
    with pytest.raises(ValueError, match=f"grown to {ROWS + 1} tokens, but `teacher_model` has positions for {ROWS}"):
        for _ in range(NEW_TOKENS):
            scores = processor(ids, next_logits(model, ids)[None])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert ids.shape[1] == ROWS + 1

    model = build(AutoModelForCausalLM, "gpt2", **TABLES["gpt2"])
    processor, ids = S2TLogitsProcessor(make_selector(model), config=offer_all(warmup_tokens=0)), ids[:, :7]
    with pytest.raises(ValueError, match=f"grown to {ROWS + 1} tokens, but `model` has positions for {ROWS}"):
        for _ in range(NEW_TOKENS):
            scores = processor(ids, next_logits(model, ids)[None])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert ids.shape[1] == ROWS


# ---------------------------------------------------------------------------------------------------------------------
# Labels and training


SEQUENCES = [single(prompts((9, 7)), row)["input_ids"][0].tolist() for row in range(2)]


def score(model, teacher):
    return score_trajectories(model, teacher, SEQUENCES, [3, 4], num_candidates=K)


@pytest.mark.parametrize("kind", ["T5", "BERT", "headless", "classifier", "meta", "PaliGemma", "XLNet", "multitask"])
def test_labels_of_models_of_a_wrong_kind_are_refused(kind):
    """Whole texts are read here: BERT and PaliGemma would see the token that they are asked about."""
    message = {"PaliGemma": "no causal", "XLNet": "no causal", "multitask": "task_ids"}.get(kind, WRONG[kind][1])
    with pytest.raises(ValueError, match=f"(?s)`teacher_model`.*{message}"):
        score(tiny_model(), WRONG[kind][0]())
    with pytest.raises(ValueError, match=f"(?s)`model`.*{message}"):
        score(WRONG[kind][0](), tiny_model(seed=9))


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning", "p-tuning", "cpt", "LoRA", "RoBERTa", "LLaVA"])
def test_labels_of_a_teacher_that_is_read_at_once_are_exact(kind):
    teacher = (RIGHT[kind] if kind in RIGHT else WRONG[kind][0])()
    for ids, prompt_length, scores in zip(SEQUENCES, [3, 4], score(tiny_model(), teacher)):
        for s, at in enumerate(range(prompt_length, len(ids))):
            logp_V = next_logits(teacher, torch.tensor([ids[:at]])).log_softmax(-1)
            expected_K = logp_V[scores.candidate_ids_SK[s]]
            torch.testing.assert_close(scores.teacher_logprobs_SK[s], expected_K, atol=1e-4, rtol=1e-4)


def test_labels_know_the_rows_of_a_table():
    teacher = build(AutoModelForCausalLM, "opt", **TABLES["opt"])
    teacher.config.max_position_embeddings = 1024
    assert LocalTeacher(teacher).max_length == ROWS


@pytest.mark.parametrize("kind", ["T5", "BERT", "classifier", "prompt tuning"])
def test_training_a_model_of_a_wrong_kind_is_refused(kind, tmp_path):
    make, message = WRONG[kind]
    args = S2TConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_candidates=4)
    with pytest.raises(ValueError, match=f"(?s)`model`.*{message}"):
        S2TTrainer(make(), args, make_labels(), processing_class=tiny_tokenizer())


def test_causal_models_pass():
    for model in (tiny_model(), RIGHT["LoRA"](), RIGHT["BERT as a decoder"](), causal("gpt_neox")):
        check_causal_lm("model", model)
        check_reads_left_to_right("model", model)
