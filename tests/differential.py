"""Random calls of `generate` through both ways into S2T, against a naive decoder over full forwards of the whole text.

    python tests/differential.py --cases 1000 --jobs 2     a night's worth: cases 0 to 999
    python tests/differential.py --case 17                 one case again, with its settings and where it goes wrong

A case is drawn from its number alone. The rule: for any mask, padding, positions and inputs that `generate` takes,
`logits_processor=S2T(...)` and `custom_generate=s2t_generate` both give the tokens, trigger values and scores of a
forward of the whole text within float error, or both refuse (ValueError, TypeError) before the first token.

- "exact": both do. "tie": one goes another way where the reference is within `TIE` of a tie (of a choice, a threshold,
  a floor, a draw). "refused": both refuse. "differs": one refuses, the other is exact.
- "late": a refusal in the middle of a text. "wrong": anything else. Either makes the exit status 1.

The reference (`decode`) knows no caches, no batches of texts and nothing of the package but its documented formulas.
It reads a text as `generate` is told to, and so does its teacher: by the mask and the positions given, or those that
`generate` makes up. What is masked in front of a text or behind it is no part of it; what is masked inside of it is
there and is not seen.

Legend: B rows, T prompt columns, K candidates, D hidden size, V vocabulary, R reserved tokens.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import random
import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from test_router import make_router, naive_features, naive_head
from tiny import BOS, EOS, PAD, SCOPES, WAYS, lora_model, tiny_model
from tiny_architectures import FAMILIES, SLIDING, WINDOW, NaiveCausalLM
from tqdm import tqdm
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from transformers_s2t import (
    S2T,
    LocalSelector,
    S2TDecodingConfig,
    S2TTrace,
    SelectorConfig,
    TeacherSelector,
    s2t_generate,
)


TIE = 1e-4
TOLERANCE = 1e-4  # of trigger values, scores and log-probabilities; relative above 1
IMPOSSIBLE = -1e4  # the score of a candidate that a teacher with a smaller head cannot emit
FAILURES = ("wrong", "late")
KINDS = ("exact", "tie", "refused", "differs", *FAILURES)

#: name -> (model type, config); all texts are longer than the windows
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "mistral-windowed": ("mistral", {"sliding_window": WINDOW}),
    "qwen2-windowed": ("qwen2", FAMILIES["qwen2"].config),
    "gemma3": ("gemma3_text", SLIDING),
    "gpt2": ("gpt2", {"n_head": 4, "n_positions": 128}),
}
SETUPS = ("teacher", "takeover", *("-".join(scope) for scope in SCOPES))
TRIGGERS = ("always", "entropy", "margin", "kl", "random", "never", "router")


@dataclass(frozen=True)
class Case:
    """One call of `generate`, drawn from `number`. Defaults are what `describe` leaves out.

    Attributes:
        padding: "none", "left" or "right"; `extra` columns more than the longest prompt needs.
        teacher_rows: so many more has the teacher's head; `teacher_pad`: of its config.
        pad: `generate`'s padding token; `filler` "any": the padded columns hold other tokens (then a mask says so).
        in_call: padding and end-of-sequence tokens are arguments of `generate`; the configs name others.
        pad_to_s2t: the padding token is an argument of `S2T` as well.
        mask: "given", "ones" or "absent"; `holes` are masked too, as (row, index in its prompt).
        positions: "absent", "right", "one-row" (right, for all rows in one), "shifted" by 3, with a "gap" in the
            middle, or the "columns" of the batch.
        inputs: "ids", "embeds" or "both"; `noise` is added to the embeddings.
        cached: so many columns of the prompt lie in a cache that `generate` is given.
        quantile: of the trigger's values without selection, where the threshold lies.
        again: the logits processor has served the same call before.
    """

    number: int
    architecture: str = "llama"
    attn: str = "sdpa"
    tied: bool = False
    layers: int = 2
    hidden_size: int = 32
    vocab_size: int = 97
    setup: str = "candidate-base"
    score_head: str = "bins"
    reserved: tuple[int, ...] = tuple(range(81, 97))
    as_peft: bool = False
    merged: bool = False
    teacher: str = "llama"
    teacher_rows: int = 0
    teacher_pad: str = "same"

    prompts: tuple[tuple[int, ...], ...] = ((5, 6, 7),)
    padding: str = "none"
    extra: int = 0
    pad: int | None = PAD
    filler: str = "pad"
    in_call: bool = False
    pad_to_s2t: bool = False
    eos: tuple[int, ...] = (EOS,)
    mask: str = "given"
    mask_dtype: str = "int64"
    holes: tuple[tuple[int, int], ...] = ()
    positions: str = "absent"
    inputs: str = "ids"
    noise: float = 0.0
    cached: int = 0

    trigger: str = "always"
    quantile: float = 0.5
    trigger_top_k: int = 64
    num_candidates: int = 5
    min_prob_ratio: float = 0.0
    warmup_tokens: int = 0
    fusion: tuple[float, ...] | None = None
    seed: int = 0

    new_tokens: int = 8
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppressed: tuple[int, ...] = ()
    suppressed_by: str = "setting"
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1
    again: bool = False

    @property
    def local(self) -> bool:
        return self.setup not in ("teacher", "takeover")

    @property
    def scope(self) -> tuple[str, str]:
        return tuple(self.setup.split("-"))

    @property
    def needs_router(self) -> bool:
        return self.trigger == "router" or bool(self.fusion and self.fusion[3:])

    @property
    def needs_teacher(self) -> bool:
        return not self.local or self.trigger == "kl"

    @property
    def teacher_vocab(self) -> int:
        return self.vocab_size + self.teacher_rows

    @property
    def never_written(self) -> list[int]:
        """Reserved tokens, and what a teacher could not read on behind."""
        lacking = set(range(self.teacher_vocab, self.vocab_size)) if self.needs_teacher else set()
        return sorted(lacking - set(self.eos) | set(self.reserved if self.local else ()))

    @property
    def writes_with(self) -> str:
        """Which tokens see the adapter as the text is written."""
        return "all" if self.local and self.scope[1] == "adapted" else "none"

    @property
    def pad_of_generate(self) -> int | None:
        """The token that `generate` pads with."""
        return self.eos[0] if self.pad is None and self.eos else self.pad

    def describe(self) -> str:
        """Everything that is not as usual, on one line."""
        unusual = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "number"]
        return " ".join(f"{name}={str(value).replace(' ', '')}" for name, value, usual in unusual if value != usual)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(number: int) -> Case:
    """The case of this number."""
    rng = random.Random(number)

    def sometimes(share: float) -> bool:
        return rng.random() < share

    def one_of(**weights: float) -> str:
        return rng.choices(list(weights), list(weights.values()))[0].replace("_", "-")

    case: dict = {"number": number, "architecture": rng.choice(list(ARCHITECTURES)), "setup": rng.choice(SETUPS)}
    windowed = case["architecture"] in ("qwen2-windowed", "gemma3")  # they name the kind of each layer
    case |= {"attn": rng.choice(["sdpa", "eager"]), "tied": sometimes(0.5), "vocab_size": rng.choice([48, 97, 131])}
    case |= {"layers": 2 if windowed else rng.randint(1, 3), "hidden_size": rng.choice([16, 32])}
    vocab, local = case["vocab_size"], case["setup"] not in ("teacher", "takeover")
    reserved = tuple(rng.sample(range(3, vocab), rng.choice([2, 5, 16]))) if local else ()
    case |= {"reserved": reserved, "score_head": rng.choice(["bins", "linear"])}
    case |= {"as_peft": local and sometimes(0.15), "merged": case["setup"] == "sequence-adapted" and sometimes(0.3)}

    # when it asks, and what decides
    case["trigger"] = one_of(always=3, entropy=2, margin=2, kl=2, random=2, never=0.5, router=2)
    case |= {"quantile": rng.uniform(0.1, 0.9), "trigger_top_k": rng.choice([64, 5]), "seed": rng.randrange(100)}
    case |= {"num_candidates": rng.randint(1, 8), "min_prob_ratio": rng.choice([0.0, 0.0, 0.05, 0.3, 1.0])}
    case["warmup_tokens"] = rng.choice([0, 0, 1, 3])
    if sometimes(0.4):
        weights = [rng.uniform(0.2, 2), rng.uniform(0, 0.3), rng.uniform(-0.5, 0.2), rng.uniform(0.05, 0.3)]
        case["fusion"] = tuple(round(weight, 2) for weight in weights[: rng.choice([1, 2, 3, 3, 4])])
    lacking = set()
    if not local or case["trigger"] == "kl":
        case["teacher"], case["teacher_rows"] = rng.choice(list(ARCHITECTURES)), rng.choice([0, 0, 0, 0, 23, -7])
        case["teacher_pad"] = one_of(same=6, none=1, other=1)
        if case["teacher_rows"] < 0 and sometimes(0.8):  # all of the text is to be such as the teacher can read
            lacking = set(range(vocab + case["teacher_rows"], vocab))

    words = [token for token in range(3, vocab) if token not in lacking.union(reserved)]

    # what ends a text, and what pads it
    case["eos"] = rng.choice([(), (EOS,), (EOS, *rng.sample(words, 5)), tuple(rng.sample(words, 3))])
    role = one_of(own=4, eos=3, bos=1.5, word=1.5, none=0.7)
    pads = {"own": PAD, "eos": case["eos"][0] if case["eos"] else EOS, "bos": BOS, "none": None}
    case["pad"] = pads[role] if role in pads else rng.choice(words)
    case["in_call"] = sometimes(0.25)
    case["padding"] = one_of(none=2, left=5, right=0.7)
    num_rows = rng.randint(1, 4)
    case["extra"] = rng.randint(1, 3) if case["padding"] != "none" and (num_rows == 1 or sometimes(0.25)) else 0
    case["mask"] = one_of(given=6, ones=1.5, absent=2)
    case["mask_dtype"] = rng.choice(["int64", "int64", "int64", "bool", "float32"])
    if case["mask"] == "given" and sometimes(0.2):
        case["filler"] = "any"

    # texts, in which the special tokens may occur and with which they may begin
    specials = sorted({BOS, EOS, PAD, *case["eos"][:2]} | ({case["pad"]} - {None}))
    share = rng.choice([0.0, 0.0, 0.1, 0.3])
    length, first = rng.randint(1, 12), rng.choice([None, None, BOS, case["pad"], EOS])
    prompts = []
    for _ in range(num_rows):
        size = length if case["padding"] == "none" else rng.randint(1, 12)
        prompt = [rng.choice(specials) if sometimes(share) else rng.choice(words) for _ in range(size)]
        if first is not None and size > 1:
            prompt[: rng.choice([1, 1, 2])] = [first]
            prompt = (prompt + [rng.choice(words)])[:size]
        if set(prompt) <= {case["pad"]}:  # `generate` itself can do nothing with a row that is all padding
            prompt[0] = next(word for word in words if word != case["pad"])
        prompts.append(tuple(prompt))
    case["prompts"] = tuple(prompts)
    if case["mask"] == "given" and sometimes(0.2):
        inside = [(row, i) for row, prompt in enumerate(prompts) for i in range(1, len(prompt) - 1)]
        case["holes"] = tuple(sorted(rng.sample(inside, min(len(inside), rng.randint(1, 4)))))
    if case["padding"] != "right":
        case["positions"] = one_of(absent=8, right=1, shifted=0.5, gap=0.5, columns=0.7)
        case["inputs"] = one_of(ids=8, embeds=0.6, both=0.8)
        if case["inputs"] != "ids" and local and case["trigger"] != "kl" and sometimes(0.5):
            case["noise"] = 0.3
        same = case["padding"] == "none" and case["mask"] != "absent" and not case.get("holes")
        if case["positions"] == "right" and same and sometimes(0.5):
            case["positions"] = "one-row"

    # what `generate` is asked for
    case["new_tokens"] = rng.randint(3, 10)
    case["min_new_tokens"] = rng.choice([0, 0, 0, min(4, case["new_tokens"])])
    case["repetition_penalty"] = rng.choice([1.0, 1.0, 1.0, 1.3, 0.8])
    case["no_repeat_ngram_size"] = rng.choice([0, 0, 0, 1, 2])
    if sometimes(0.2) or lacking:
        banned = lacking | set(rng.sample(words, len(words) // 3) if sometimes(0.8) else ())
        case |= {"suppressed": tuple(sorted(banned)), "suppressed_by": rng.choice(["setting", "user"])}
    if sometimes(0.4):
        case |= {"do_sample": True, "temperature": rng.choice([1.0, 0.7, 1.5]), "top_k": rng.choice([0, 0, 10])}
        case |= {"top_p": rng.choice([1.0, 1.0, 0.9]), "num_return_sequences": rng.choice([1, 1, 2, 3])}
    if case.get("positions") == "one-row" and num_rows > 1 and case.get("num_return_sequences", 1) > 1:
        case["positions"] = "right"  # `generate` would repeat the one row, and fail
    case["again"] = sometimes(0.15)
    width = max(map(len, prompts)) + case["extra"]
    plain = case["padding"] != "right" and case["inputs"] == "ids" and case.get("num_return_sequences", 1) == 1
    if plain and case["mask"] != "absent" and width > 1 and sometimes(0.12):
        case["cached"] = rng.randint(1, width - 1)
    case["pad_to_s2t"] = case["pad"] is not None and sometimes(0.15)
    return Case(**case)


# ---------------------------------------------------------------------------------------------------------------------
# What is called


@dataclass
class Built:
    """Models, what selects, and the naive models that stand for them."""

    model: torch.nn.Module
    caller: torch.nn.Module
    selector: TeacherSelector | LocalSelector
    teacher: torch.nn.Module | None
    router: object | None
    naive: WholeText
    naive_teacher: WholeText | None


def build(case: Case) -> Built:
    pad, eos = case.pad, list(case.eos) or None
    if case.in_call:
        pad, eos = (None if pad in (PAD, None) else PAD), None
    common = {"bos_token_id": BOS, "eos_token_id": eos}

    def make(architecture: str, attn: str, seed: int, vocab_size: int, pad: int | None, **config):
        family, own = ARCHITECTURES[architecture]
        if family == "gpt2":
            own = own | {"n_embd": config["hidden_size"], "n_layer": config["num_hidden_layers"]}
        config = config | {"vocab_size": vocab_size, "pad_token_id": pad, "head_dim": config["hidden_size"] // 4}
        return tiny_model(family, seed, attn, **(config | common | own))

    shape = {"hidden_size": case.hidden_size, "num_hidden_layers": case.layers, "tie_word_embeddings": case.tied}
    shape |= {"seed": case.number, "vocab_size": case.vocab_size, "pad": pad}
    student = functools.partial(make, case.architecture, **shape)
    model = caller = student(case.attn)
    teacher = naive_teacher = None
    if case.needs_teacher:
        known = None if pad is None or pad >= case.teacher_vocab else pad
        pads = {"same": known, "none": None, "other": 4}
        settings = {"seed": case.number + 1, "vocab_size": case.teacher_vocab, "pad": pads[case.teacher_pad]}
        settings |= {"hidden_size": 32, "num_hidden_layers": 2}
        teacher = make(case.teacher, case.attn, **settings)
        naive_teacher = WholeText(make(case.teacher, "eager", **settings))
    router = make_router(model, 1 + case.number % case.layers, seed=case.number) if case.needs_router else None
    if case.local:
        caller = lora_model(model, case.number, reserved=case.reserved)
        selector = LocalSelector(
            caller, SelectorConfig(case.reserved, *case.scope, score_head=case.score_head), "s2t", router=router
        )
        naive = WholeText(student("eager"), selector)
        if case.merged:
            selector.merge()
        caller = caller if case.as_peft else model
    else:
        selector = TeacherSelector(teacher, takeover=case.setup == "takeover", router=router)
        naive = WholeText(student("eager"))
    return Built(model, caller, selector, teacher, router, naive, naive_teacher)


@dataclass
class Prompt:
    """What `generate` is given, and how it reads it: mask and positions of B rows, those of `num_return_sequences`."""

    arguments: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_BT: torch.Tensor
    embeds_BTD: torch.Tensor

    def cache(self, model: torch.nn.Module, num_columns: int) -> DynamicCache:
        """A cache of the first columns."""
        cache, columns = DynamicCache(config=model.config), slice(0, num_columns)
        with torch.no_grad():
            model(
                input_ids=self.ids_BT[:, columns],
                attention_mask=self.mask_BT[:, columns],
                position_ids=self.positions_BT[:, columns],
                past_key_values=cache,
            )
        return cache


def write_prompt(case: Case, model: torch.nn.Module) -> Prompt:
    width = max(map(len, case.prompts)) + case.extra
    generator = torch.Generator().manual_seed(case.number)
    filler = PAD if case.pad_of_generate is None else case.pad_of_generate
    ids_BT = torch.full((len(case.prompts), width), filler)
    if case.filler == "any":
        ids_BT = torch.randint(3, case.vocab_size, ids_BT.shape, generator=generator)
    real_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(case.prompts):
        start = 0 if case.padding == "right" else width - len(prompt)
        ids_BT[row, start : start + len(prompt)] = torch.tensor(prompt)
        real_BT[row, start : start + len(prompt)] = 1
        for _, index in (hole for hole in case.holes if hole[0] == row):
            real_BT[row, start + index] = 0
    arguments = {}
    if case.mask == "absent":
        mask_BT = torch.ones_like(ids_BT)
        pad = case.pad_of_generate
        if case.inputs != "embeds" and pad is not None and pad not in case.eos:
            mask_BT = (ids_BT != pad).long()
    else:
        mask_BT = real_BT if case.mask == "given" else torch.ones_like(ids_BT)
        arguments["attention_mask"] = mask_BT.to(getattr(torch, case.mask_dtype))
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    if case.positions != "absent":
        if case.positions == "shifted":
            positions_BT = positions_BT + 3
        elif case.positions == "gap":
            positions_BT = positions_BT + 4 * (positions_BT > positions_BT.amax(-1, keepdim=True) // 2)
        elif case.positions == "columns":
            positions_BT = torch.arange(width).expand_as(ids_BT)
        arguments["position_ids"] = positions_BT[:1] if case.positions == "one-row" else positions_BT
    with torch.no_grad():
        embeds_BTD = model.get_input_embeddings()(ids_BT)
    embeds_BTD = embeds_BTD + case.noise * embeds_BTD.std() * torch.randn(embeds_BTD.shape, generator=generator)
    if case.inputs != "embeds":
        arguments["input_ids"] = ids_BT
    if case.inputs != "ids":
        arguments["inputs_embeds"] = embeds_BTD
    read = (
        tensor.repeat_interleave(case.num_return_sequences, 0)
        for tensor in (ids_BT, mask_BT, positions_BT, embeds_BTD)
    )
    return Prompt(arguments, *read)


class CountTokens(StoppingCriteria):
    """Stops nothing; knows how many tokens there are."""

    def __init__(self):
        self.num_tokens = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


def settings_of(case: Case) -> dict:
    """The arguments of `generate` that have nothing to do with S2T."""
    settings: dict = {"max_new_tokens": case.new_tokens, "do_sample": case.do_sample}
    for name in ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"):
        if getattr(case, name) != Case.__dataclass_fields__[name].default:
            settings[name] = getattr(case, name)
    if case.suppressed and case.suppressed_by == "setting":
        settings["suppress_tokens"] = list(case.suppressed)
    if case.do_sample:
        names = ("temperature", "top_k", "top_p", "num_return_sequences")
        settings |= {name: getattr(case, name) for name in names}
    if case.in_call:
        settings |= {"pad_token_id": case.pad} if case.pad is not None else {}
        settings |= {"eos_token_id": list(case.eos)} if case.eos else {}
    return settings


class Outcome(NamedTuple):
    """What came of one way into `generate`."""

    sequences: torch.Tensor | None = None
    trace: S2TTrace | None = None
    error: Exception | None = None
    num_tokens: int = 0


def call(way: str, case: Case, built: Built, prompt: Prompt, threshold: float | None) -> Outcome:
    count, trace = CountTokens(), S2TTrace()
    own = [SuppressTokensLogitsProcessor(list(case.suppressed))] if case.suppressed_by == "user" else []
    settings = settings_of(case) | prompt.arguments | {"stopping_criteria": StoppingCriteriaList([count])}
    try:
        config = S2TDecodingConfig(
            trigger=case.trigger,
            num_candidates=case.num_candidates,
            min_prob_ratio=case.min_prob_ratio,
            threshold=threshold,
            trigger_top_k=case.trigger_top_k,
            warmup_tokens=case.warmup_tokens,
            fusion=case.fusion,
            seed=case.seed,
        )
        teacher = built.teacher if case.local else None
        if way == "processor":
            pad = case.pad if case.pad_to_s2t else None
            one = S2T(built.selector, teacher_model=teacher, config=config, pad_token_id=pad, trace=trace)
            settings["logits_processor"] = LogitsProcessorList([*own, *one]) if own else one
        else:
            settings |= {"custom_generate": s2t_generate, "selector": built.selector, "teacher_model": teacher}
            settings |= {"decoding_config": config, "trace": trace}
            settings |= {"logits_processor": LogitsProcessorList(own)} if own else {}
        for _ in range(1 + (case.again and way == "processor")):
            count.num_tokens = 0
            if case.cached:
                settings["past_key_values"] = prompt.cache(built.model, case.cached)
            torch.manual_seed(case.number)
            sequences = built.caller.generate(**settings)
    except Exception as error:  # whatever it is, it is what came of this way
        return Outcome(error=error, num_tokens=count.num_tokens)
    return Outcome(sequences, trace, num_tokens=count.num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one text at a time, no caches, every prefix and all its candidates a full forward


class WholeText(NaiveCausalLM):
    """[`NaiveCausalLM`] that is told which tokens of a text may be seen and where they stand."""

    def __init__(self, base, selector=None):
        super().__init__(base, selector)
        if selector is not None:
            wrapper = selector.model.get_output_embeddings().token_adapter
            trained = dict(zip(wrapper.token_indices["s2t"], wrapper.trainable_tokens_delta["s2t"]))
            self.rows_RD = torch.stack([trained[id].detach() for id in selector.selector_config.reserved_token_ids])

    def embed(self, ids):
        return self.base.get_input_embeddings()(torch.tensor(ids))

    @torch.no_grad()
    def read(self, text, tokens_adapted="none", candidates=(), all_layers=False):
        """What the head reads (N, D), logits (N, V) and, on request, all layers' hidden states (N, D) after the text,
        or after the text and each candidate."""
        texts = [[*text.ids, *([candidate])] for candidate in candidates] or [text.ids]
        length = len(texts[0])
        embeds_NTD = torch.stack([self.embed(ids) for ids in texts])
        if text.embeds_TD is not None:
            embeds_NTD[:, : len(text.embeds_TD)] = text.embeds_TD
        mask_T = torch.tensor([*text.mask, 1][:length])
        positions_T = torch.tensor([*text.positions, text.positions[-1] + 1][:length])
        self.texts, self.tokens_adapted = texts, tokens_adapted
        output = self.base(
            inputs_embeds=embeds_NTD,
            attention_mask=mask_T.expand(len(texts), -1),
            position_ids=positions_T.expand(len(texts), -1),
            use_cache=False,
            output_hidden_states=all_layers,
        )
        return self.hidden_BD, output.logits[:, -1], [states[:, -1] for states in output.hidden_states or ()]


@dataclass
class Text:
    """One row's text so far: what may be seen of it, and where it stands. `embeds_TD` in place of its first tokens."""

    ids: list[int]
    mask: list[int]
    positions: list[int]
    embeds_TD: torch.Tensor | None

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.mask.append(1)
        self.positions.append(self.positions[-1] + 1)


class Step(NamedTuple):
    """What the reference says of one step of one row. `gap`: how far from any tie."""

    value: float
    triggered: bool
    asked: bool
    first: int
    token: int
    gap: float
    scores: dict[int, tuple[float, float]] = {}  # candidate -> (score, log-probability)


@dataclass
class Expected:
    """New tokens of all rows (B, N) and what happened at each step until a row ends, by row."""

    tokens_BN: torch.Tensor
    rows: list[list[Step]] = field(default_factory=list)


class Unreadable(Exception):
    """The text holds a token that the teacher does not know."""


def texts_of(case: Case, prompt: Prompt) -> list[Text]:
    texts = []
    for row, mask_T in enumerate(prompt.mask_BT):
        real = mask_T.nonzero()[:, 0].tolist()
        own = slice(real[0], real[-1] + 1)
        columns = (tensor[row, own].tolist() for tensor in (prompt.ids_BT, prompt.mask_BT, prompt.positions_BT))
        texts.append(Text(*columns, prompt.embeds_BTD[row, own] if case.noise else None))
    return texts


def processors_of(case: Case, prompt: Prompt, num_columns: int) -> tuple[list, list]:
    """What `generate` makes of the settings: processors, and the warpers behind them."""
    processors, warpers = [], []
    if case.repetition_penalty != 1:
        padded = not bool(prompt.mask_BT.all())
        ignored = (prompt.mask_BT != 0).int().argmax(1) if padded else None
        processors.append(RepetitionPenaltyLogitsProcessor(case.repetition_penalty, prompt_ignore_length=ignored))
    if case.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(case.no_repeat_ngram_size))
    if case.min_new_tokens and case.eos:
        processors.append(MinNewTokensLengthLogitsProcessor(num_columns, case.min_new_tokens, list(case.eos)))
    if case.suppressed:
        processors.append(SuppressTokensLogitsProcessor(list(case.suppressed)))
    if case.do_sample:
        if case.temperature != 1:
            warpers.append(TemperatureLogitsWarper(case.temperature))
        if case.top_k:
            warpers.append(TopKLogitsWarper(case.top_k))
        if case.top_p < 1:
            warpers.append(TopPLogitsWarper(case.top_p))
    return processors, warpers


def lead(values: torch.Tensor) -> float:
    """By how much the best value is ahead of the second one."""
    best = values.sort(descending=True).values[:2].tolist()
    return best[0] - best[1] if len(best) > 1 else math.inf


def renormalised(logits: torch.Tensor) -> list[float]:
    """Probabilities of what can be said."""
    return logits.double().softmax(-1).tolist()


def trigger_value(case: Case, built: Built, logits_V, teacher_logits, hidden_D, random_value: float) -> float:
    """As the docstrings of config.py and triggers.py have it, in float64."""
    if case.trigger == "random":
        return random_value
    if case.trigger == "entropy":
        top = renormalised(logits_V.sort(descending=True).values[: case.trigger_top_k])
        return -sum(p * math.log(p) for p in top if p > 0)
    if case.trigger == "margin":
        return -lead(logits_V)
    if case.trigger == "kl":
        shared = min(len(logits_V), len(teacher_logits()))
        sayable = [token for token in range(shared) if logits_V[token] > -math.inf]
        pairs = zip(renormalised(teacher_logits()[sayable]), renormalised(logits_V[sayable]))
        return sum(p * math.log(p / q) for p, q in pairs if p > 0)
    if case.trigger == "router":
        return naive_head(built.router.head, hidden_D, naive_features(logits_V))
    return 0.0


def selector_scores(case: Case, built: Built, text: Text, candidates: list[int], teacher_logits) -> list[float]:
    """As the docstrings of config.py and fusion.py have it."""
    if not case.local:
        logprobs = teacher_logits().double().log_softmax(-1).tolist()
        return [max(logprobs[token], IMPOSSIBLE) if token < len(logprobs) else IMPOSSIBLE for token in candidates]
    adapted = {"candidate": "last", "sequence": "all"}[case.scope[0]]
    hidden_KD, _, _ = built.naive.read(text, adapted, candidates)
    z_KR = (hidden_KD @ built.naive.rows_RD.T).double()
    half = z_KR.shape[1] // 2
    if case.score_head == "linear":
        return (z_KR[:, half:].mean(-1) - z_KR[:, :half].mean(-1)).tolist()
    return (z_KR.softmax(-1) @ torch.linspace(0, 1, z_KR.shape[1], dtype=torch.double)).tolist()


def step_of_row(
    case: Case, built: Built, text: Text, logits_V, hidden_D, default: int, gap: float, is_warm: bool, threshold, value
) -> Step:
    """What one step does with one text. `gap`: of the draw or the argmax that gave `default`."""

    @functools.cache
    def teacher_logits():
        if max(token for token, seen in zip(text.ids, text.mask) if seen) >= case.teacher_vocab:
            raise Unreadable
        shown = Text([min(id, case.teacher_vocab - 1) for id in text.ids], text.mask, text.positions, None)
        return built.naive_teacher.read(shown)[1][0]

    value = trigger_value(case, built, logits_V, teacher_logits, hidden_D, value)
    triggered = is_warm and case.trigger != "never" and (threshold is None or value >= threshold)
    if is_warm and threshold is not None:
        gap = min(gap, abs(value - threshold))
    logprobs = logits_V.double().log_softmax(-1)
    ranked = logprobs.sort(descending=True, stable=True)
    best, ids = ranked.values.tolist(), ranked.indices.tolist()
    gap = min(gap, best[0] - best[1])
    if not triggered:
        return Step(value, False, False, ids[0], default, gap)
    if case.setup == "takeover":
        shared = min(case.vocab_size, case.teacher_vocab)
        allowed = teacher_logits()[:shared].masked_fill(torch.isinf(logits_V[:shared]), -math.inf)
        return Step(value, True, True, ids[0], int(allowed.argmax()), min(gap, lead(allowed)))
    floor = best[0] + math.log(case.min_prob_ratio) if case.min_prob_ratio else -math.inf
    num = next((k for k in range(1, case.num_candidates) if best[k] < floor or best[k] == -math.inf), None)
    num = num or case.num_candidates
    if case.min_prob_ratio:
        gap = min([gap, *(abs(logprob - floor) for logprob in best[1 : case.num_candidates])])
    if num == case.num_candidates and best[num] > -math.inf:
        gap = min(gap, best[num - 1] - best[num])
    if num == 1:
        return Step(value, True, False, ids[0], default, gap)
    scores = selector_scores(case, built, text, ids[:num], teacher_logits)
    weights = [*(case.fusion or (1.0,)), 0.0, 0.0, 0.0][:4]
    others = weights[2]
    if weights[3]:
        others += weights[3] * naive_head(built.router.head, hidden_D, naive_features(logits_V))
    fused = [weights[0] * scores[k] + weights[1] * best[k] + (others if k else 0.0) for k in range(num)]
    gap = min(gap, lead(torch.tensor(fused, dtype=torch.double)))
    token = ids[fused.index(max(fused))]
    return Step(value, True, True, ids[0], token, gap, dict(zip(ids[:num], zip(scores, best[:num]))))


@torch.no_grad()
def decode(case: Case, built: Built, prompt: Prompt, threshold: float | None) -> Expected:
    """What `generate` has to return.

    Raises:
        Unreadable: where the teacher has to read a token that it does not know.
    """
    texts = texts_of(case, prompt)
    ids_BT = prompt.ids_BT if case.inputs != "embeds" else prompt.ids_BT[:, :0]
    num_columns = ids_BT.shape[1]
    processors, warpers = processors_of(case, prompt, num_columns)
    expected = Expected(ids_BT[:, :0], [[] for _ in texts])
    unfinished = [True] * len(texts)
    fires = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.number)
    for step in range(case.new_tokens):
        logits_BV, hidden_BD = torch.zeros(len(texts), case.vocab_size), [None] * len(texts)
        for row, text in enumerate(texts):
            if unfinished[row]:
                _, logits_1V, states = built.naive.read(text, case.writes_with, all_layers=built.router is not None)
                logits_BV[row] = logits_1V[0]
                hidden_BD[row] = states[built.router.config.layer][0] if built.router else None
        for processor in processors:
            logits_BV = processor(ids_BT, logits_BV)
        logits_BV[:, case.never_written] = -math.inf
        warped_BV = logits_BV.clone()
        for warper in warpers:
            warped_BV = warper(ids_BT, warped_BV)
        if case.do_sample:  # what torch.multinomial does, and how near it comes to another draw
            probs_BV = warped_BV.softmax(-1)
            race_BV = (probs_BV / torch.empty_like(probs_BV).exponential_()).log()
            default_B, gap_B = race_BV.argmax(-1), [lead(race_V) for race_V in race_BV]
        else:
            default_B, gap_B = warped_BV.argmax(-1), [lead(warped_V) for warped_V in warped_BV]
        random_B = torch.rand(len(texts), generator=fires).tolist() if case.trigger == "random" else [0.0] * len(texts)
        tokens = []
        for row, text in enumerate(texts):
            if not unfinished[row]:
                tokens.append(case.pad_of_generate)
                continue
            own = (logits_BV[row], hidden_BD[row], int(default_B[row]), gap_B[row])
            done = step_of_row(
                case, built, text, *own, step >= case.warmup_tokens, threshold=threshold, value=random_B[row]
            )
            expected.rows[row].append(done)
            text.append(done.token)
            tokens.append(done.token)
            unfinished[row] = done.token not in case.eos
        tokens_B1 = torch.tensor(tokens)[:, None]
        ids_BT = torch.cat([ids_BT, tokens_B1], dim=1)
        expected.tokens_BN = torch.cat([expected.tokens_BN, tokens_B1], dim=1)
        if not any(unfinished):
            break
    return expected


def threshold_of(case: Case, built: Built, prompt: Prompt) -> float | None:
    """Near the case's quantile of the values of a text without selection, in the middle of a gap between two."""
    if case.trigger in ("always", "never"):
        return None
    if case.trigger == "random":
        return case.quantile
    rows = decode(replace(case, new_tokens=min(case.new_tokens, 5)), built, prompt, math.inf).rows
    values = sorted(step.value for row in rows for step in row)
    if len(values) == 1:
        return values[0] - 1.0
    near = min(max(int(case.quantile * len(values)), 1), len(values) - 1)
    around = range(max(near - 1, 1), min(near + 1, len(values) - 1) + 1)
    at = max(around, key=lambda i: values[i] - values[i - 1])
    return (values[at - 1] + values[at]) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


class Difference(NamedTuple):
    """Where a way first leaves the reference."""

    row: int
    step: int
    what: str


def differences(case: Case, expected: Expected, outcome: Outcome, prompt: Prompt) -> list[Difference]:
    """The first difference of each row, whether or not a tie excuses it. Row -1: of the whole."""
    num_columns = 0 if case.inputs == "embeds" else prompt.ids_BT.shape[1]
    found = []
    if outcome.sequences.shape[0] != len(expected.rows) or not torch.equal(
        outcome.sequences[:, :num_columns], prompt.ids_BT[:, :num_columns]
    ):
        return [Difference(-1, -1, "another prompt came back")]
    if outcome.trace.prompt_length != num_columns:
        found.append(Difference(-1, -1, f"prompt_length {outcome.trace.prompt_length}, not {num_columns}"))
    tokens_BN, rows = outcome.sequences[:, num_columns:], outcome.trace.rows()
    if tokens_BN.shape[1] != len(outcome.trace.steps):
        found.append(Difference(-1, -1, f"{len(outcome.trace.steps)} steps traced of {tokens_BN.shape[1]}"))
        return found
    for row, steps in enumerate(expected.rows):
        for number, step in enumerate(steps):
            if number >= tokens_BN.shape[1]:
                found.append(Difference(row, number, "the text ends early"))
                break
            what = wrong_with(step, rows[row][number], int(tokens_BN[row, number]))
            if what:
                found.append(Difference(row, number, what))
                break
        else:
            rest = set(tokens_BN[row, len(steps) :].tolist())
            if not rest <= {case.pad_of_generate} or (rest and not case.eos):
                found.append(Difference(row, len(steps), f"goes on with {sorted(rest)}"))
    if not found and tokens_BN.shape != expected.tokens_BN.shape:
        found.append(Difference(-1, -1, f"{tokens_BN.shape[1]} new tokens, not {expected.tokens_BN.shape[1]}"))
    return found


def numbers_of(step: Step, traced: dict) -> list[tuple[str, float, float]]:
    """Name, traced number and the reference's."""
    numbers = [("trigger value", traced["value"], step.value)]
    if step.scores and "scores" in traced:
        for id, score, logprob in zip(traced["candidate_ids"], traced["scores"], traced["logprobs"]):
            if id in step.scores:
                numbers.append((f"score of {id}", score, step.scores[id][0]))
                numbers.append((f"log-probability of {id}", logprob, step.scores[id][1]))
    return numbers


def error_of(value: float, reference: float) -> float:
    """Relative above 1."""
    return abs(value - reference) / max(1.0, abs(reference))


def wrong_with(step: Step, traced: dict, token: int) -> str | None:
    """What a traced step has that the reference has not."""
    for name, value, reference in numbers_of(step, traced):
        if not error_of(value, reference) <= TOLERANCE:
            return f"{name} is {value:.5f}, not {reference:.5f}"
    for name in ("triggered", "asked", "first"):
        if traced[name] != getattr(step, name):
            return f"{name} {traced[name]}, not {getattr(step, name)}"
    if step.scores and set(traced["candidate_ids"]) != set(step.scores):
        return f"candidates {sorted(traced['candidate_ids'])}, not {sorted(step.scores)}"
    if token != step.token:
        return f"token {token}, not {step.token}"
    return None


class Result(NamedTuple):
    """What came of a case.

    Attributes:
        kind: see the top of this file.
        ways: way into `generate` -> (kind, why).
        num_asked: choices of the reference.
        num_flipped: those that are not the student's first token.
        largest_error: of the numbers compared where a way is exact, relative above 1.
    """

    case: Case
    kind: str
    ways: dict[str, tuple[str, str]]
    num_asked: int = 0
    num_flipped: int = 0
    largest_error: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES

    def __str__(self) -> str:
        told = "; ".join(f"{way} {kind}{': ' if why else ''}{why}" for way, (kind, why) in self.ways.items())
        return f"python tests/differential.py --case {self.case.number}   # {told} | {self.case.describe()}"


def judge(case: Case, expected: Expected | None, outcome: Outcome, prompt: Prompt) -> tuple[str, str]:
    """Kind of what came of one way, and why."""
    if outcome.error is not None:
        told = f"{type(outcome.error).__name__}: {outcome.error}"
        if not isinstance(outcome.error, (ValueError, TypeError)):
            return "wrong", told
        return ("late" if outcome.num_tokens else "refused"), told
    if expected is None:
        return "wrong", "goes on with a text that the teacher cannot read"
    found = differences(case, expected, outcome, prompt)
    tied = [next((number for number, step in enumerate(steps) if step.gap < TIE), math.inf) for steps in expected.rows]
    unexcused = [d for d in found if (min(tied) if d.row < 0 else tied[d.row]) > d.step]
    if any(d.row < 0 for d in unexcused) and min(tied) < math.inf:
        unexcused = [d for d in unexcused if d.row >= 0 or "prompt" in d.what]
    if unexcused:
        first = unexcused[0]
        where = f"row {first.row} step {first.step}: " if first.row >= 0 else ""
        return "wrong", f"{where}{first.what}"
    return ("tie" if found else "exact"), ""


def run_case(case: Case) -> Result:
    """Both ways of one case, and what came of them."""
    built = build(case)
    prompt = write_prompt(case, built.model)
    try:
        threshold = threshold_of(case, built, prompt)
    except Unreadable:
        threshold = 0.5
    try:
        expected = decode(case, built, prompt, threshold)
    except Unreadable:
        expected = None
    ways, errors = {}, [0.0]
    for way in WAYS:
        outcome = call(way, case, built, prompt, threshold)
        ways[way] = judge(case, expected, outcome, prompt)
        if ways[way][0] == "exact":
            pairs = (pair for steps in zip(expected.rows, outcome.trace.rows()) for pair in zip(*steps))
            errors += [error_of(*numbers) for pair in pairs for _, *numbers in numbers_of(*pair)]
    kinds = {kind for kind, _ in ways.values()}
    if "refused" in kinds and not kinds & set(FAILURES):
        kind = "refused" if kinds == {"refused"} else "differs"
    else:
        kind = next(kind for kind in ("wrong", "late", "tie", "exact") if kind in kinds)
    asked = [step for row in expected.rows for step in row if step.asked] if expected else []
    return Result(case, kind, ways, len(asked), sum(step.token != step.first for step in asked), max(errors))


def run_number(number: int) -> Result:
    return run_case(draw(number))


def plain_is_exact(case: Case) -> bool:
    """Whether `generate` without S2T is a forward of the whole text in this case: what is wrong may be its own."""
    built = build(case)
    prompt = write_prompt(case, built.model)
    expected = decode(replace(case, trigger="never"), built, prompt, None)
    banned = {*case.suppressed, *(case.reserved if case.local else ())}
    settings = settings_of(case) | prompt.arguments | ({"suppress_tokens": sorted(banned)} if banned else {})
    if case.cached:
        settings["past_key_values"] = prompt.cache(built.model, case.cached)
    torch.manual_seed(case.number)
    sequences = built.caller.generate(**settings)
    return sequences[:, -expected.tokens_BN.shape[1] :].tolist() == expected.tokens_BN.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def be_quiet() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)


def reason(why: str) -> str:
    """A refusal's message without what is particular to a case."""
    return re.sub(r"\d+", "N", re.sub(r"\[.*?\]", "[...]", why))[:110]


def table(results: list[Result]) -> str:
    asked, flipped = (sum(getattr(result, name) for result in results) for name in ("num_asked", "num_flipped"))
    error = max((result.largest_error for result in results), default=0.0)
    lines = [f"{len(results)} cases, {asked} choices, {flipped} of them not the student's first token"]
    lines += [f"largest error of an exact trigger value, score or log-probability: {error:.1e}"]
    names = ("architecture", "attn", "setup", "trigger", "padding", "mask", "positions", "inputs")
    columns = [("all", [""] * len(results))]
    columns += [(name, [getattr(result.case, name) for result in results]) for name in names]
    columns.append(("holes", ["some" if result.case.holes else "none" for result in results]))
    lines.append(" ".join(f"{kind:>8}" for kind in KINDS))
    for name, values in columns:
        for value in dict.fromkeys(sorted(values)):
            kinds = Counter(result.kind for result, own in zip(results, values) if own == value)
            lines.append(" ".join(f"{kinds[kind]:8}" for kind in KINDS) + f"  {name} {value}")
    for title, wanted in (("refused by both", ("refused",)), ("refused by one alone", ("differs", *FAILURES))):
        reasons = Counter(
            f"{way}: {reason(why)}"
            for result in results
            if result.kind in wanted
            for way, (kind, why) in result.ways.items()
            if kind in ("refused", "late")
        )
        lines += [f"{title}:"] if reasons else []
        lines += [f"  {number:5} {text}" for text, number in reasons.most_common()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", type=int, help="run this one alone and tell everything about it")
    args = parser.parse_args(arguments)
    be_quiet()
    if args.case is not None:
        result = run_number(args.case)
        for f in fields(result.case):
            print(f"{f.name:22} {getattr(result.case, f.name)}")
        for way, (kind, why) in result.ways.items():
            print(f"{way:10} {kind} {why}")
        if result.failed:
            alike = "equals" if plain_is_exact(result.case) else "differs from"
            print(f"generate without S2T {alike} a forward of the whole text")
        print(result.kind)
        return int(result.failed)
    numbers = range(args.seed, args.seed + args.cases)
    results = []
    pool = multiprocessing.get_context("spawn").Pool(args.jobs, be_quiet) if args.jobs > 1 else nullcontext()
    with pool, tqdm(total=len(numbers), smoothing=0.05) as bar:
        found = pool.imap_unordered(run_number, numbers, chunksize=4) if args.jobs > 1 else map(run_number, numbers)
        for result in found:
            results.append(result)
            bar.update()
            if result.failed:
                bar.write(str(result), file=sys.stdout)
    results.sort(key=lambda result: result.case.number)
    for result in results:
        if result.kind == "differs":
            print(result)
    print(table(results))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
