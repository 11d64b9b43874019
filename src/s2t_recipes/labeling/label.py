"""Labels problems: the student's rollouts, its candidates at decision points, the teacher's view of them.

    s2t label --model recipes/embedded/student --teacher_model recipes/embedded/teacher --dataset data/embedded \
        --split label --output_dir labels/embedded --max_new_tokens 72

A teacher too large for this machine may be behind a vLLM server: `--teacher_url http://host:8000`, with its tokenizer
and config in `--teacher_model` (no weights are loaded). A key, where one is needed, is read from OPENAI_API_KEY.
A teacher with another tokenizer needs `--cross_tokenizer true` and compares texts (docs/labeling.md).

The same command resumes an interrupted run. `s2t label --num_processes 4 ...` shares the problems among processes, as
`accelerate launch` does. `--dry_run true` labels a sample, keeps nothing and says what the rest will
cost. Label training problems only: calibrate on other ones, evaluate on yet others.
Everything is checked before weights are loaded and before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq
import tokenizers
import torch
import transformers
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

import transformers_s2t
from s2t_recipes.adapters import check_model
from s2t_recipes.commands import CommandFailed, kept, one_line_errors, say, work
from s2t_recipes.models import DTYPES, check_quantization, load_pretrained, make_quantization_config, padding_token_id
from s2t_recipes.options import Parser, check_least
from s2t_recipes.problems import (
    check_template_kwargs,
    encode_prompts,
    load_problems,
    read_rows,
    read_template_kwargs,
    template_variables,
)
from s2t_recipes.report.data_card import write_data_card
from s2t_recipes.splits import PROMPT_COLUMNS
from transformers_s2t import LocalSelector, S2TDecodingConfig, TeacherSelector, s2t_generate
from transformers_s2t.config import check_choice
from transformers_s2t.files import write_json
from transformers_s2t.labeling.cross_tokenizer import CrossTokenizer
from transformers_s2t.labeling.http_teacher import HTTPTeacher, TeacherError, host_free
from transformers_s2t.labeling.label_problems import (
    check_lengths,
    divide,
    find_unfinished,
    label_problems,
    label_stats,
)
from transformers_s2t.labeling.points import check_num_candidates
from transformers_s2t.labeling.teachers import CrossTokenizerTeacher, Teacher, as_teacher
from transformers_s2t.labels.folder import done_problem_ids, label_splits, read_labels, shard_files
from transformers_s2t.labels.schema import CORRECTED_ROLLOUTS, HEADER_NAME, TrajectoryHeader
from transformers_s2t.reserved_tokens import check_same_vocabulary, find_reserved_token_ids, vocab_hash
from transformers_s2t.selector_files import ADAPTER_WEIGHTS_NAME, adapter_folder


STATS_NAME = "label_stats.json"
DRY_RUN_PROBLEMS = 8  # or a whole batch, where that is more: the time of a row depends on how many run beside it


@dataclass
class LabelArguments:
    """Which models label which problems, and how."""

    model: str = HfArg(help="Student: a Hub id or a local folder.")
    dataset: str = HfArg(
        help="Problems: a .jsonl, .json or .parquet file, a folder of such files, or a Hub id (id:config)."
    )
    output_dir: str = HfArg(help="Folder for the labels. An interrupted run in it is resumed.")
    teacher_model: str | None = HfArg(
        default=None,
        help="Teacher, with the same tokenizer unless `cross_tokenizer` is set: a Hub id or a local folder. With "
        "`teacher_url` its tokenizer is compared and its config read; left out, the server's tokenizer is taken to be "
        "the student's.",
    )
    cross_tokenizer: bool = HfArg(
        default=False,
        help="The teacher may have another tokenizer: a candidate's score is an estimate, the log-probability that "
        "the text continues with the candidate's text (docs/labeling.md). With `chat_template` the teacher reads "
        "prompts in its own template. Not with `teacher_url` or rollout_policy 's2t'.",
    )
    teacher_url: str | None = HfArg(
        default=None, help="vLLM server that runs the teacher, e.g. http://host:8000; key in OPENAI_API_KEY."
    )
    teacher_served_name: str | None = HfArg(
        default=None, help="Name of the teacher on a server with several models, where it is not `teacher_model`."
    )
    top_logprobs: int = HfArg(
        default=20, help="Number of tokens that the server names at each position, at most its own --max-logprobs."
    )
    max_concurrency: int = HfArg(default=16, help="Number of requests to the server at one time.")
    split: str | None = HfArg(default=None, help="Split on the Hub, or file name in a folder.")
    prompt_column: str | None = HfArg(
        default=None, help="Column with the prompts (default: 'prompt', or else 'question' or 'problem')."
    )
    answer_column: str | None = HfArg(
        default=None, help="Column that must be there, where it is given. Labels do not use answers."
    )
    skip: int = HfArg(default=0, help="Number of first problems to leave out.")
    limit: int | None = HfArg(default=None, help="Number of problems to label (default: all).")
    max_prompt_tokens: int | None = HfArg(
        default=None,
        help="Number of tokens to which prompts are cut (story models with a short context). With `chat_template`, "
        "which must not be cut, problems with longer prompts are left out and counted.",
    )
    num_candidates: int = HfArg(default=16, help="Number K of the student's tokens stored at each point.")
    target_rate: float = HfArg(default=0.1, help="Share of generated tokens whose divergence reaches the threshold.")
    divergence_threshold: float | None = HfArg(
        default=None, help="Threshold in nats (default: estimated from `target_rate` on the first 200 problems)."
    )
    min_prob_ratio: float = HfArg(
        default=0.05, help="Candidate floor: least probability of a candidate, as a share of the best one's."
    )
    points: str = HfArg(
        default="floor+kl",
        help="Points that are stored: 'kl' (paper), 'floor' (two candidates above it), 'floor+kl' or 'all'.",
    )
    max_points: int | None = HfArg(
        default=None, help="Largest number of points of one trajectory, spread evenly among its own (default: all)."
    )
    max_new_tokens: int = HfArg(default=256, help="Largest number of new tokens of a rollout.")
    rollout_policy: str = HfArg(
        default="greedy",
        help="Who writes: the student alone ('greedy', 'sample'), or corrected by the teacher ('s2t') or by a trained "
        "selector ('s2t-local', a second round).",
    )
    temperature: float = HfArg(default=1.0, help="Temperature of 'sample'.")
    num_rollouts: int = HfArg(default=1, help="Number of rollouts of each problem; several with 'sample' only.")
    validation_share: float = HfArg(
        default=0.0,
        help="Share of the problems that is held out, as the split 'validation'. A hash of the prompt decides, so "
        "these are the same problems in every run.",
    )
    adapter: str | None = HfArg(default=None, help="Trained selector of 's2t-local'.")
    trigger: str = HfArg(default="always", help="Trigger at which 's2t' and 's2t-local' correct.")
    trigger_rate: float | None = HfArg(
        default=None, help="Share of tokens at which the trigger fires, as calibrated with the adapter."
    )
    trigger_threshold: float | None = HfArg(default=None, help="Threshold of the trigger, instead of a rate.")
    batch_size: int = HfArg(default=32, help="Rollouts per forward.")
    shard_size: int = HfArg(default=100, help="Problems per file, the most that a killed run can lose.")
    seed: int = HfArg(default=0, help="Seed of the sampling.")
    chat_template: bool = HfArg(default=False, help="Put prompts into the tokenizer's chat template.")
    system_prompt: str | None = HfArg(default=None, help="System message of the chat template.")
    chat_template_kwargs: dict[str, Any] | str | None = HfArg(
        default=None,
        help="Variables of the chat template: a JSON object, e.g. '{\"enable_thinking\": false}', in YAML a mapping.",
    )
    dtype: str = HfArg(
        default="auto",
        help="Type of the weights: auto (float32 on a CPU, else the checkpoint's own), float32, bfloat16 or float16.",
    )
    teacher_load_in_4bit: bool = HfArg(
        default=False, help="Quantize the teacher to 4 bits (bitsandbytes, nf4) as it is loaded."
    )
    teacher_load_in_8bit: bool = HfArg(default=False, help="Quantize the teacher to 8 bits.")
    device_map: str | None = HfArg(
        default=None, help="Place of the weights, e.g. 'auto' (default with an accelerator) or 'cpu'."
    )
    overwrite: bool = HfArg(default=False, help="Replace labels that are in `output_dir`.")
    push_to_hub: str | None = HfArg(default=None, help="Hub data set (you/name) for the finished labels.")
    license: str | None = HfArg(
        default=None, help="Licence of the labels, for the metadata of their card: apache-2.0 ..."
    )
    private: bool = HfArg(default=False, help="Make that data set a private one.")
    dry_run: bool = HfArg(default=False, help="Label a sample, keep nothing, and print what the whole job will cost.")

    def __post_init__(self):
        self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        if self.teacher_model is None and self.teacher_url is None:
            raise ValueError("`teacher_model` is required, or `teacher_url` of a server that runs the teacher.")
        if self.teacher_served_name is not None and self.teacher_url is None:
            raise ValueError("`teacher_served_name` must be given with `teacher_url` only: it names a server's model.")
        check_choice("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "shard_size", "top_logprobs", "max_concurrency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        check_least(self, skip=0, max_prompt_tokens=1)
        if self.rollout_policy == "s2t" and self.teacher_url is not None:
            raise ValueError(
                "`rollout_policy` must not be 's2t' with `teacher_url`: a server is too far to ask at steps."
            )
        if self.cross_tokenizer and self.teacher_url is not None:
            raise ValueError(
                f"`cross_tokenizer` must be false with `teacher_url`, got true with {self.teacher_url!r}: a server "
                "names its best tokens only."
            )
        if self.cross_tokenizer and self.rollout_policy == "s2t":
            raise ValueError(
                "`rollout_policy` must be 'greedy', 'sample' or 's2t-local' with cross_tokenizer=true, got 's2t': the "
                "teacher corrects in tokens of its own only."
            )
        if self.cross_tokenizer and self.chat_template and self.max_prompt_tokens is not None:
            raise ValueError(
                "`max_prompt_tokens` must not be given with cross_tokenizer=true and chat_template=true, got "
                f"{self.max_prompt_tokens}: a prompt has two lengths there, one in each model's template."
            )
        if self.trigger == "kl" and self.rollout_policy == "s2t-local":
            raise ValueError("`trigger` must not be 'kl' with rollout_policy='s2t-local', which has no teacher.")
        if (self.adapter is None) == (self.rollout_policy == "s2t-local"):
            raise ValueError(
                f"`adapter` must be given with rollout_policy='s2t-local' and with no other, got {self.adapter!r} "
                f"with {self.rollout_policy!r}."
            )
        if self.teacher_url is not None and self.teacher_quantization:
            raise ValueError(
                f"`teacher_load_in_4bit` and `teacher_load_in_8bit` must not be true with `teacher_url`, got "
                f"{self.teacher_url!r}: the server has loaded its model already."
            )
        check_quantization(self.teacher_load_in_4bit, self.teacher_load_in_8bit, "teacher_")
        self.header()  # checks the rest

    @property
    def teacher_quantization(self) -> str:
        return "nf4" if self.teacher_load_in_4bit else "int8" if self.teacher_load_in_8bit else ""

    def decoding_config(self) -> S2TDecodingConfig | None:
        """When a selector corrects the student; `None` where none does."""
        if self.rollout_policy not in CORRECTED_ROLLOUTS:
            return None
        return S2TDecodingConfig(trigger=self.trigger, target_rate=self.trigger_rate, threshold=self.trigger_threshold)

    def decoding_settings(self) -> dict[str, Any]:
        """Settings of the correction for the header; the adapter is named by a hash of its weights."""
        config = self.decoding_config()
        if config is None:
            return {}
        settings = {name: getattr(config, name) for name in ("trigger", "target_rate", "threshold")}
        if self.adapter is not None:
            file = adapter_folder(self.adapter) / ADAPTER_WEIGHTS_NAME
            if not file.is_file():
                raise ValueError(f"`adapter` must be the folder of a trained selector, got {self.adapter!r}.")
            settings["adapter"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return settings

    def header(self) -> TrajectoryHeader:
        """The settings, without what has to be read from the models."""
        names = ("dataset", "split", "prompt_column", "chat_template", "system_prompt", "max_prompt_tokens")
        prompt_source = {name: getattr(self, name) for name in names}
        if self.chat_template_kwargs is not None:  # older labels do not name it
            prompt_source["chat_template_kwargs"] = self.chat_template_kwargs
        return TrajectoryHeader(
            model=self.model,
            teacher_model=self.teacher_model or "",
            teacher_quantization=self.teacher_quantization,
            vocab_hash="",
            num_candidates=self.num_candidates,
            target_rate=self.target_rate,
            divergence_threshold=self.divergence_threshold,
            threshold_sample=200 if self.divergence_threshold is None else 0,
            min_prob_ratio=self.min_prob_ratio,
            points=self.points,
            max_points=self.max_points,
            rollout=self.rollout_policy,
            decoding=self.decoding_settings(),
            temperature=self.temperature,
            num_rollouts=self.num_rollouts,
            validation_share=self.validation_share,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            prompt_source=prompt_source,
            versions={
                module.__name__: module.__version__
                for module in (transformers_s2t, transformers, torch, datasets, tokenizers)
            },
        )


class Plan(NamedTuple):
    """What is known before weights are loaded."""

    prompts: dict[str, list[int]]
    header: TrajectoryHeader
    pad_token_id: int
    teacher: HTTPTeacher | None = None
    cross: CrossTokenizer | None = None
    teacher_prompts: dict[tuple[int, ...], list[int]] | None = None
    num_too_long: int = 0  # problems that are left out


def prepare(args: LabelArguments) -> Plan:
    """Checks everything that can be checked without weights. Writes nothing.

    Raises:
        ValueError, FileNotFoundError: one clear line about the argument that is wrong.
    """
    if args.prompt_column is None:
        args.prompt_column = guess_prompt_column(args)
    until = None if args.limit is None else args.skip + args.limit
    problems = load_problems(args.dataset, args.split, args.prompt_column, args.answer_column, until)[args.skip :]
    if not problems:
        raise ValueError(f"`skip` must be below the number of problems, got {args.skip}: nothing is left to label.")
    for argument in ("model", "teacher_model"):
        if (name := getattr(args, argument)) is not None:
            check_model(argument, name)
    tokenizer = load_pretrained("model", args.model, AutoTokenizer)
    teacher_tokenizer, teacher_config = tokenizer, None
    if args.teacher_model is not None:
        teacher_tokenizer = load_pretrained("teacher_model", args.teacher_model, AutoTokenizer)
        teacher_config = load_pretrained("teacher_model", args.teacher_model, AutoConfig)
    config = load_pretrained("model", args.model, AutoConfig)
    eos_token_ids = _eos_token_ids(args.model, config, tokenizer.eos_token_id)
    cross = None
    if args.cross_tokenizer:
        teacher_eos_ids = _eos_token_ids(args.teacher_model, teacher_config, teacher_tokenizer.eos_token_id)
        cross = pair_tokenizers(tokenizer, teacher_tokenizer, eos_token_ids, teacher_eos_ids)
    if cross is None:
        try:
            check_same_vocabulary(tokenizer, teacher_tokenizer)
        except ValueError as error:
            raise ValueError(f"{error} Or pass --cross_tokenizer true, to compare texts.") from None
    teacher = None if args.teacher_url is None else connect(args, teacher_config)

    num_head_rows = config.get_text_config().vocab_size
    try:
        excluded_ids = find_reserved_token_ids(tokenizer, num_head_rows)
    except ValueError:
        excluded_ids = []  # training will resize the head: there is nothing yet that could be proposed
    check_num_candidates(args.num_candidates, num_head_rows, excluded_ids)
    pad_token_id = padding_token_id(tokenizer, args.model)

    texts = [problem.prompt for problem in problems]
    kwargs, teacher_kwargs = args.chat_template_kwargs, None
    if cross is not None and args.chat_template and kwargs:  # of either template
        templates = [one for one in (tokenizer, teacher_tokenizer) if one.chat_template is not None]
        check_template_kwargs(kwargs, *templates)
        kwargs, teacher_kwargs = (known_to(one, kwargs) for one in (tokenizer, teacher_tokenizer))
    encoded = encode_prompts(tokenizer, texts, args.chat_template, args.system_prompt, kwargs)
    num_all = len(problems)
    if args.max_prompt_tokens is not None and args.chat_template:
        shortest = min(map(len, encoded))
        if shortest > args.max_prompt_tokens:
            raise ValueError(
                f"`max_prompt_tokens` must be at least {shortest}, the shortest prompt in its chat template, got "
                f"{args.max_prompt_tokens}: a template must not be cut, and no problem would be left."
            )
        fits = [len(ids) <= args.max_prompt_tokens for ids in encoded]
        problems, texts, encoded = (list(compress(many, fits)) for many in (problems, texts, encoded))
    elif args.max_prompt_tokens is not None:
        encoded = [ids[: args.max_prompt_tokens] for ids in encoded]
    prompts = {problem.id: ids for problem, ids in zip(problems, encoded)}
    divide(prompts, args.validation_share)
    longest = longest_for_teacher = max(len(ids) for ids in encoded)
    teacher_prompts = None
    if cross is not None:
        if args.chat_template:
            try:
                own = encode_prompts(teacher_tokenizer, texts, args.chat_template, args.system_prompt, teacher_kwargs)
            except ValueError as error:
                raise ValueError(f"`teacher_model` {args.teacher_model!r}: {error}") from None
            teacher_prompts = {tuple(ids): teacher_ids for ids, teacher_ids in zip(encoded, own)}
        longest_for_teacher = max(teacher_tokens(cross, *pair, teacher_prompts) for pair in zip(texts, encoded))
    teacher_length = teacher_config if teacher is None else teacher.max_length
    check_lengths(longest, args.max_new_tokens, {"model": config})
    check_lengths(longest_for_teacher, args.max_new_tokens, {"teacher_model": teacher_length})
    header = replace(
        args.header(),
        vocab_hash=vocab_hash(tokenizer),
        cross_tokenizer={} if cross is None else cross.settings,
        eos_token_ids=tuple(eos_token_ids),
        excluded_ids=tuple(excluded_ids),
        dtype=resolve_dtype(args.dtype, config),
    )
    if teacher is not None:
        source = {"teacher_model": args.teacher_model or teacher.source, "teacher_source": teacher.source}
        header = replace(header, **source, top_logprobs=teacher.top_logprobs)
    quantization_of_teacher(args, header.dtype)  # is bitsandbytes there?
    find_unfinished(args.output_dir, header, args.overwrite)
    return Plan(prompts, header, pad_token_id, teacher, cross, teacher_prompts, num_all - len(problems))


def guess_prompt_column(args: LabelArguments) -> str:
    """The first of the usual names that the first problem has."""
    names = next(iter(read_rows(args.dataset, args.split)), {})
    found = next((name for name in PROMPT_COLUMNS if name in names), PROMPT_COLUMNS[0])
    if found != PROMPT_COLUMNS[0]:
        say(f"prompts are read from the column {found!r}, for there is no {PROMPT_COLUMNS[0]!r} (`prompt_column`).")
    return found


def known_to(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `chat_template_kwargs` that a tokenizer's template uses."""
    names = None if tokenizer.chat_template is None else template_variables(tokenizer)
    return {name: value for name, value in kwargs.items() if names is None or name in names}


def pair_tokenizers(
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    teacher_eos_token_ids: list[int],
) -> CrossTokenizer | None:
    """Both tokenizers, or `None` where they are one."""
    if vocab_hash(tokenizer) == vocab_hash(teacher_tokenizer):
        return None
    for name, ids in (("model", eos_token_ids), ("teacher_model", teacher_eos_token_ids)):
        if not ids:
            raise ValueError(f"`{name}` must have an end-of-text token for `cross_tokenizer`, got none.")
    try:
        return CrossTokenizer(tokenizer, teacher_tokenizer, eos_token_ids, teacher_eos_token_ids)
    except ValueError as error:
        raise ValueError(f"`cross_tokenizer` of `model` and `teacher_model`: {error}") from None


def teacher_tokens(
    cross: CrossTokenizer, text: str, ids: list[int], teacher_prompts: dict[tuple[int, ...], list[int]] | None
) -> int:
    """Length of a prompt in the teacher's tokens."""
    try:
        return cross.count_tokens(ids, len(ids), None if teacher_prompts is None else teacher_prompts[tuple(ids)])
    except ValueError as error:
        where = f"`cross_tokenizer`: the prompt {text[:60]!r} cannot be read by `teacher_model`"
        raise ValueError(f"{where}: {error}") from None


def connect(args: LabelArguments, teacher_config: PretrainedConfig | None) -> HTTPTeacher:
    """The model of the server with the name `teacher_served_name`, else `teacher_model`, else the only one."""
    rows = None if teacher_config is None else teacher_config.get_text_config().vocab_size
    try:
        settings = {name: getattr(args, name) for name in ("max_concurrency", "top_logprobs")}
        names = (args.teacher_url, args.teacher_served_name, args.teacher_model)
        return HTTPTeacher(*names, **settings, num_embeddings=rows)
    except ValueError as error:  # `url` and `model` have other names here
        message = str(error).replace("`url`", "`teacher_url`").replace("`model`", "`teacher_served_name`")
        raise ValueError(message) from None
    except TeacherError as error:
        raise ValueError(f"`teacher_url`: {error}") from None


def quantization_of_teacher(args: LabelArguments, dtype: str) -> BitsAndBytesConfig | None:
    """Matrices are multiplied in `dtype`, the type of the other weights."""
    return make_quantization_config(args.teacher_load_in_4bit, args.teacher_load_in_8bit, dtype, prefix="teacher_")


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """The type of the weights; 'auto' is float32 on a CPU, else the type in the checkpoint."""
    if dtype != "auto":
        return dtype
    if not torch.accelerator.is_available():
        return "float32"
    return str(config.get_text_config().dtype or "float32").removeprefix("torch.")


def _eos_token_ids(name: str, config: PretrainedConfig, tokenizer_eos: int | None) -> list[int]:
    """All tokens that end a text: those of the generation config (chat models have several) and the tokenizer's."""
    try:
        ids = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ids = config.get_text_config().eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, *([] if tokenizer_eos is None else [tokenizer_eos])})


def load_models(
    args: LabelArguments, plan: Plan
) -> tuple[PreTrainedModel, PreTrainedModel | Teacher, dict[str, Any] | None]:
    """The student, the teacher, and how the student's rollouts are corrected."""
    dtype = plan.header.dtype
    state = process_state(args)
    device_map = args.device_map or ("auto" if torch.accelerator.is_available() else "cpu")
    if args.device_map is None and state.num_processes > 1:
        device_map = {"": state.device}  # each process has both models on its own device
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=device_map)
    teacher = plan.teacher
    if teacher is None:
        quantized = quantization_of_teacher(args, dtype)
        settings = {"dtype": dtype, "device_map": device_map, "quantization_config": quantized}
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model, **settings)
    if plan.cross is not None:
        teacher = CrossTokenizerTeacher(teacher, plan.cross, plan.teacher_prompts)
    decode_with = None
    if args.rollout_policy in CORRECTED_ROLLOUTS:
        if args.adapter is None:
            selector = TeacherSelector(teacher)
        else:
            selector = LocalSelector.from_pretrained(args.adapter, model)
        decode_with = {"custom_generate": s2t_generate, "selector": selector}
        decode_with["decoding_config"] = args.decoding_config()
    return model, teacher, decode_with


def process_state(args: LabelArguments) -> PartialState:
    """Which of the processes that accelerate has started this one is."""
    return PartialState(cpu=args.device_map == "cpu" or not torch.accelerator.is_available())


def label(args: LabelArguments, plan: Plan) -> dict[str, Any] | None:
    """Loads the weights, labels, writes the statistics and returns them; `None` in all processes but the main one."""
    state = process_state(args)
    model, teacher, decode_with = load_models(args, plan)
    settings = {name: getattr(args, name) for name in ("batch_size", "shard_size", "overwrite")}
    settings["decode_with"] = decode_with
    header = label_problems(model, teacher, plan.prompts, args.output_dir, plan.header, plan.pad_token_id, **settings)
    if not state.is_main_process:
        return None
    labels, _ = read_labels(args.output_dir, split="all")
    stats = {
        "divergence_threshold": header.divergence_threshold,
        "too_long_problems": plan.num_too_long,  # left out
        "splits": {split: len(read_labels(args.output_dir, split)[0]) for split in label_splits(args.output_dir)},
        **label_stats(labels, header.divergence_threshold),
    }
    for half_written in Path(args.output_dir).glob(f".{STATS_NAME}.*"):  # of a run that was killed here
        half_written.unlink()
    write_json(Path(args.output_dir) / STATS_NAME, stats)
    write_data_card(args.output_dir, labels, header, stats, args.license)
    if args.push_to_hub is not None:
        push(args, header)
    return stats


def push(args: LabelArguments, header: TrajectoryHeader) -> None:
    """Uploads the folder. Its header names models and data by their local paths, which are nobody else's business."""
    source = header.prompt_source | {"dataset": host_free(args.dataset)}
    names = {name: host_free(getattr(header, name)) for name in ("model", "teacher_model")}
    public = json.dumps(replace(header, prompt_source=source, **names).to_dict(), indent=2) + "\n"
    hub, repo = HfApi(), {"repo_id": args.push_to_hub, "repo_type": "dataset"}
    hub.create_repo(**repo, private=args.private, exist_ok=True)
    hub.upload_folder(**repo, folder_path=args.output_dir, ignore_patterns=[HEADER_NAME, ".*"])
    hub.upload_file(**repo, path_in_repo=HEADER_NAME, path_or_fileobj=public.encode())


def report(args: LabelArguments, stats: dict[str, Any]) -> str:
    hits = " ".join(f"Hit@{k} {value:.3f}" for k, value in stats["hit_at_k"].items()) or "none stored"
    splits = ", ".join(f"{split}: {rows}" for split, rows in stats["splits"].items())
    return (
        f"{stats['rows']} trajectories ({splits}), {stats['tokens']} generated tokens, {stats['points']} decision "
        f"points in {args.output_dir}\n"
        f"divergence >= {stats['divergence_threshold']:.4f} nats at {stats['kl_tokens']} tokens "
        f"({stats['kl_tokens'] / stats['tokens']:.1%}), {stats['kl_points']} of them stored\n"
        f"teacher's choice among the student's first k there: {hits}"
    )


class Cost(NamedTuple):
    """Cost of the remaining work, estimated from a sample. Loading the models is not in the time."""

    sample: int
    sample_seconds: float
    done: int
    problems: int
    prompt_tokens: int  # these two in the teacher's own tokens
    generated_tokens: int
    positions: int
    points: int
    seconds: float
    num_bytes: int


def estimate(args: LabelArguments, plan: Plan) -> Cost:
    """Labels a sample of the remaining problems in a temporary folder, and scales its cost up."""
    unfinished = find_unfinished(args.output_dir, plan.header, args.overwrite) is not None
    done = done_problem_ids(args.output_dir) & plan.prompts.keys() if unfinished else set()
    todo = [id for id in plan.prompts if id not in done]
    if not todo:
        return Cost(0, 0.0, len(done), 0, 0, 0, 0, 0, 0.0, 0)
    num_sample = min(len(todo), max(DRY_RUN_PROBLEMS, args.batch_size // args.num_rollouts))
    sample = {id: plan.prompts[id] for id in (todo[i * len(todo) // num_sample] for i in range(num_sample))}
    model, teacher, decode_with = load_models(args, plan)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        header = replace(plan.header, validation_share=0.0)
        settings = {"batch_size": args.batch_size, "shard_size": num_sample, "decode_with": decode_with}
        label_problems(model, teacher, sample, folder, header, plan.pad_token_id, **settings)
        seconds = time.perf_counter() - began
        files = shard_files(folder)
        num_bytes = sum(file.stat().st_size for file in files)
        columns = ["input_ids", "prompt_length", "divergence", "positions"]
        rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    share, count = len(todo) / num_sample, as_teacher(teacher).count_tokens
    read = sum(count(row["input_ids"], row["prompt_length"]) for row in rows)
    read -= args.num_rollouts * sum(count(ids, len(ids)) for ids in sample.values())
    return Cost(
        sample=num_sample,
        sample_seconds=seconds,
        done=len(done),
        problems=len(todo),
        prompt_tokens=args.num_rollouts * sum(count(plan.prompts[id], len(plan.prompts[id])) for id in todo),
        generated_tokens=round(share * read),
        positions=round(share * sum(len(row["divergence"]) for row in rows)),
        points=round(share * sum(len(row["positions"]) for row in rows)),
        seconds=share * seconds,
        num_bytes=round(share * num_bytes),
    )


def report_cost(cost: Cost) -> str:
    if not cost.problems:
        return f"dry run: all {cost.done} problems are labelled, nothing is left to do"
    minutes = cost.seconds / 60
    disk = f"{cost.num_bytes / 1e6:.1f} MB" if cost.num_bytes >= 1e6 else f"{cost.num_bytes / 1e3:.1f} kB"
    time_left = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.1f} minutes"
    return (
        f"dry run: {cost.sample} problems took {cost.sample_seconds:.1f} s, nothing was kept\n"
        f"left to do: {cost.problems} problems ({cost.done} are done); about\n"
        f"  teacher tokens  {cost.prompt_tokens + cost.generated_tokens} "
        f"({cost.prompt_tokens} of prompts, {cost.generated_tokens} generated)\n"
        f"  positions       {cost.positions} scored, {cost.points} stored as decision points\n"
        f"  time            {time_left}, and loading the models\n"
        f"  disk            {disk}"
    )


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    (args,) = Parser(LabelArguments).parse_args_and_config(argv)
    if args.dry_run and process_state(args).num_processes > 1:
        raise ValueError("`dry_run` is for one process: start it without options of `accelerate launch`.")
    plan = prepare(args)
    if plan.teacher is not None and args.teacher_model is None:
        say("without `teacher_model` nobody checks that the server has the same tokens.")
    if plan.num_too_long:
        say(
            f"{plan.num_too_long} of {plan.num_too_long + len(plan.prompts)} problems are left out: in the chat "
            f"template their prompts have more than `max_prompt_tokens`={args.max_prompt_tokens} tokens."
        )
    if args.cross_tokenizer and plan.cross is None:
        say("`cross_tokenizer` is not needed: both models have one tokenizer.")
    try:
        if args.dry_run:
            with kept(lambda: False):
                print(report_cost(estimate(args, plan)))
            return
        with work():
            stats = label(args, plan)
    except TeacherError as error:
        raise CommandFailed(f"{error} What is labelled is kept; the same command resumes.") from error
    if stats is not None:
        print(report(args, stats))
