"""Everything that is read, checked and decided before a model is loaded: arguments in, one plan out.

Problems that an adapter has seen, in training or after (its
seen_problems.json), are refused, and so are those of --label_dirs and --prior_labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from s2t_recipes.adapters import check_model, check_tuned
from s2t_recipes.evaluation.arguments import EvaluateArguments
from s2t_recipes.evaluation.bench import Bench
from s2t_recipes.evaluation.controls import token_prior
from s2t_recipes.evaluation.fidelity import Labels, measure_hits, open_labels
from s2t_recipes.evaluation.policies import GREEDY, Policy, choose_policies, parse_tuned
from s2t_recipes.metrics import load_metric
from s2t_recipes.models import default_device, padding_token_id
from s2t_recipes.problems import PROMPT_SETTINGS, Problem, encode_prompts, load_problems
from s2t_recipes.records import fingerprint, hash_of
from transformers_s2t import S2TDecodingConfig, SelectorConfig, __version__
from transformers_s2t.labels.folder import read_header, read_labels
from transformers_s2t.labels.seen_problems import STAGES, check_unseen
from transformers_s2t.reserved_tokens import check_same_vocabulary, vocab_hash


RECORDS_FORMAT = 3  # of records/, and of how answers are read: those of another format are run again


@dataclass(frozen=True)
class Selectors:
    """The S2T-Local adapters, and what serves the policies without one.

    Attributes:
        paths: one adapter per seed.
        configs: their settings.
        shared_path, shared: the adapter whose thresholds and router serve the others; `None` without adapters.
    """

    paths: list[str]
    configs: list[SelectorConfig]
    shared_path: str | None
    shared: SelectorConfig | None

    @classmethod
    def read(cls, paths: list[str], thresholds_from: str | None) -> Selectors:
        shared_path = thresholds_from or (paths[0] if paths else None)
        shared = SelectorConfig.from_pretrained(shared_path) if shared_path else None
        return cls(paths, [SelectorConfig.from_pretrained(path) for path in paths], shared_path, shared)

    @property
    def thresholds(self) -> dict[str, dict[float, float]]:
        """Trigger -> {target rate: threshold}, of policies without an adapter."""
        return {} if self.shared is None else self.shared.thresholds

    @property
    def has_router(self) -> bool:
        return self.shared is not None and all(config.router for config in [self.shared, *self.configs])


@dataclass(frozen=True, eq=False)
class Job:
    """A policy with one of its adapters, or with none: what is run, kept on disk and recognised as one.

    Attributes:
        policy: policy that is run.
        seed: number of the adapter; `None` for a policy without adapters.
        adapter: folder or Hub id of a selector or of an adapter that writes text itself.
        config: settings of selecting; `None` for plain decoding.
        settings: all settings that its records depend on.
        file: file of its records.
    """

    policy: Policy
    seed: int | None
    adapter: str | None
    config: S2TDecodingConfig | None
    settings: dict[str, Any]
    file: Path

    @property
    def settings_hash(self) -> str:
        return hash_of(self.settings)


@dataclass(frozen=True)
class Plan:
    """What an evaluation does, decided.

    Attributes:
        args: arguments of the evaluation, checked.
        bench: problems, and how policies are run on them.
        selectors: S2T-Local adapters.
        jobs: jobs in the order of the table, seed by seed.
        by_length: whether problems share a batch with those of like greedy texts.
        prior: token prior; `None` without `prior_labels`.
        zero_shot_id: token that the control `zero-shot` makes unlikely; `None` for the most certain candidate.
        held_out: labels on which selectors are compared with the teacher; `None` for none.
        hit_at_k, agree_at_1: figures of these labels without a selector.
        leaks: sentences about problems that were seen before, where that is allowed.
    """

    args: EvaluateArguments
    bench: Bench
    selectors: Selectors
    jobs: list[Job]
    by_length: bool
    prior: Counter | None
    zero_shot_id: int | None
    held_out: Labels | None
    hit_at_k: dict[str, float]
    agree_at_1: dict[str, float]
    leaks: list[str]

    @property
    def policies(self) -> list[Policy]:
        """The rows of the table."""
        return list(dict.fromkeys(job.policy for job in self.jobs))


def make_plan(args: EvaluateArguments) -> Plan:
    """Reads and checks everything that can be wrong.

    Raises:
        FileNotFoundError: for a folder or file that is not there.
        ValueError: naming the argument, its legal values and the value given.
    """
    tuned = parse_tuned(args.tuned)
    check_sources(args, tuned)
    selectors = Selectors.read(args.adapters, args.thresholds_from)
    policies = check_thresholds(
        args, choose_policies(args, bool(selectors.thresholds), selectors.has_router), selectors
    )
    problems = read_problems(args)
    check_same_prompts(args)
    leaks = find_leaks(problem_checks(args, problems, tuned), args.allow_leaks)
    held_out, hit_at_k, agree_at_1 = None, {}, {}
    if args.eval_labels:
        held_out = open_labels(args.eval_labels, selectors.configs)
        seen = (partial(check_unseen, p, held_out.rows["problem_id"], STAGES, "eval_labels") for p in args.adapters)
        leaks += find_leaks(seen, args.allow_leaks)
        hit_at_k, agree_at_1 = measure_hits(held_out, args.num_candidates)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.teacher_model is not None:
        check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(args.teacher_model))
    prior = None if args.prior_labels is None else read_prior(args.prior_labels, tokenizer)
    zero_shot_id = None if args.zero_shot_text is None else first_token(args.zero_shot_text, tokenizer)
    bench = make_bench(args, problems, tokenizer, default_device())
    load_metric("math_answer")  # it is copied into a cache, which may not be writable
    by_length = args.batch_by == "greedy_length" and policies[0] == GREEDY  # else nothing tells the lengths
    return Plan(
        args=args,
        bench=bench,
        selectors=selectors,
        jobs=plan_jobs(args, policies, selectors, tuned, bench, prior, by_length),
        by_length=by_length,
        prior=prior,
        zero_shot_id=zero_shot_id,
        held_out=held_out,
        hit_at_k=hit_at_k,
        agree_at_1=agree_at_1,
        leaks=leaks,
    )


def check_folder(name: str, value: str | None) -> None:
    """Raises a FileNotFoundError for a path that is not there; `name` or `owner/name` may be on the Hub."""
    looks_local = value is not None and (value.startswith((".", "/", "~")) or value.count("/") > 1)
    if looks_local and not Path(value).expanduser().exists():
        raise FileNotFoundError(f"`{name}`: {value!r} does not exist.")


def check_sources(args: EvaluateArguments, tuned: dict[str, list[str]]) -> None:
    """Raises a ValueError or FileNotFoundError where a model, adapter or data set is none, or is not there."""
    sources = [("model", args.model), ("teacher_model", args.teacher_model), ("dataset", args.dataset)]
    sources += [("prior_labels", args.prior_labels), *(("adapters", path) for path in args.adapters)]
    for name, value in sources + [("tuned", path) for paths in tuned.values() for path in paths]:
        check_folder(name, value)
        if name in ("model", "teacher_model") and value is not None:
            check_model(name, value)
        elif name == "tuned":
            check_tuned(name, value, "name it in `adapters`")


def check_thresholds(args: EvaluateArguments, policies: list[Policy], selectors: Selectors) -> list[Policy]:
    """The policies whose triggers were calibrated for their rates. The default table goes without the others, and a
    printed line names them.

    Raises:
        ValueError: for a policy that was asked for by name and has no threshold.
    """
    kept, left_out = [], []
    for policy in policies:
        tables = [config.thresholds for config in selectors.configs] if policy.is_local else [selectors.thresholds]
        try:
            for thresholds in tables if policy.trigger is not None else ():
                policy.decoding_config(args).resolve_threshold(thresholds)
            kept.append(policy)
        except ValueError:
            if args.policies is not None:
                raise
            left_out.append(policy.label)
    if left_out:
        print(f"left out, no threshold was calibrated for them (s2t calibrate): {', '.join(left_out)}")
    return kept


def read_problems(args: EvaluateArguments) -> list[Problem]:
    """The problems to evaluate.

    Raises:
        FileNotFoundError: where there is no such file, folder or data set.
        ValueError: where there is no problem, or one without an answer.
    """
    columns = {"prompt_column": args.prompt_column, "answer_column": args.answer_column}
    problems = load_problems(args.dataset, split=args.split, limit=args.limit, **columns)
    if not problems:
        raise ValueError(f"`dataset`: {args.dataset!r} holds no problems in split {args.split!r}.")
    if unanswered := [problem.id for problem in problems if problem.answer is None]:
        raise ValueError(
            f"`dataset`: {len(unanswered)} of {len(problems)} problems have no answer in column "
            f"{args.answer_column!r} (first id {unanswered[0]}): there is nothing to check against."
        )
    return problems


def check_same_prompts(args: EvaluateArguments) -> None:
    """Raises a ValueError where labels of a selector say that prompts were put in another way than here."""
    folders = [("label_dirs", folder) for folder in args.label_dirs]
    folders += [("prior_labels", args.prior_labels), ("eval_labels", args.eval_labels)]
    for argument, folder in folders:
        if folder is None:
            continue
        header = read_header(folder) if Path(folder).is_dir() else read_labels(folder, split="all")[1]
        if header is None or "chat_template" not in header.prompt_source:
            continue
        for name in PROMPT_SETTINGS:
            there, here = header.prompt_source.get(name), getattr(args, name)
            if there != here:
                raise ValueError(
                    f"`{name}` must be as in the labels of `{argument}` {folder!r}, which were made with {there!r}, "
                    f"got {here!r}: the model would be asked in another way than the selector has learned."
                )


def find_leaks(checks: Iterator[Callable[[], None]], allowed: bool) -> list[str]:
    """Runs checks that raise a ValueError for problems that were seen before; returns their messages.

    Raises:
        ValueError: the first of them, where leaks are not `allowed`.
    """
    leaks = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            if not allowed:
                more = "(`--allow_leaks true` measures all the same, and the report says so.)"
                raise ValueError(f"{error} {more}") from None
            leaks.append(str(error))
    return leaks


def problem_checks(
    args: EvaluateArguments, problems: list[Problem], tuned: dict[str, list[str]]
) -> Iterator[Callable[[], None]]:
    """Whether the problems were labelled, or seen by an adapter that takes part."""
    yield partial(check_no_leak, problems, args.label_dirs)
    if args.prior_labels is not None:
        yield partial(check_no_leak, problems, [args.prior_labels], "prior_labels")
    ids = [problem.id for problem in problems]
    adapters = [*args.adapters, *(path for paths in tuned.values() for path in paths)]
    for path in dict.fromkeys([*adapters, *filter(None, [args.thresholds_from])]):
        yield partial(check_unseen, path, ids, STAGES, "dataset")


def check_no_leak(problems: Sequence[Problem], label_dirs: Sequence[str], argument: str = "label_dirs") -> None:
    """Raises a ValueError where a problem under evaluation was labelled for training or calibration."""
    ids = {str(problem.id) for problem in problems}
    for folder in label_dirs:
        shared = sorted(ids & set(read_labels(folder, split="all")[0]["problem_id"]))
        if shared:
            raise ValueError(
                f"`{argument}`: {folder!r} holds {len(shared)} of the {len(ids)} problems to evaluate (ids "
                f"{', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}). A selector must not have seen them: "
                "evaluate on another split, or label one."
            )


def read_prior(folder: str, tokenizer: PreTrainedTokenizerBase) -> Counter:
    """The token prior of a label folder. Raises a ValueError where its ids are of another tokenizer."""
    labels, header = read_labels(folder)
    if header is not None and header.vocab_hash != vocab_hash(tokenizer):
        raise ValueError(
            f"`prior_labels`: {folder!r} was made with another tokenizer ({header.vocab_hash}) than that of `model` "
            f"({vocab_hash(tokenizer)}): its token ids mean something else."
        )
    return token_prior(labels)


def first_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token of `zero_shot_text`. Raises a ValueError where there is none that the tokenizer knows."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"`zero_shot_text` must begin with a token that the model knows, got {text!r}.")
    return ids[0]


def make_bench(
    args: EvaluateArguments, problems: list[Problem], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Bench:
    """The problems, encoded.

    Raises:
        ValueError: for prompts that cannot be put as asked, or that leave no room for `max_new_tokens`.
    """
    how = {name: getattr(args, name) for name in PROMPT_SETTINGS}
    bench = Bench(
        problems=problems,
        prompt_ids=encode_prompts(tokenizer, [problem.prompt for problem in problems], **how),
        tokenizer=tokenizer,
        pad_token_id=padding_token_id(tokenizer, args.model),
        device=device,
        batch_size=args.batch_size,
        drops_rows=args.batch_by == "greedy_length",
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        answer_style=args.answer_style,
    )
    for name in filter(None, (args.model, args.teacher_model)):
        text_config = AutoConfig.from_pretrained(name).get_text_config()
        bench.check_length(getattr(text_config, "max_position_embeddings", None))
    return bench


def common_settings(args: EvaluateArguments, bench: Bench) -> dict[str, Any]:
    """What all records depend on."""
    names = ("answer_style", "max_new_tokens", "batch_size", "dtype", *PROMPT_SETTINGS)
    return {
        "version": __version__,
        "records": RECORDS_FORMAT,
        "model": fingerprint(args.model),
        "problems": hash_of([asdict(problem) for problem in bench.problems]),
        "device": bench.device.type,
        **{name: getattr(args, name) for name in names},
    }


def plan_jobs(
    args: EvaluateArguments,
    policies: list[Policy],
    selectors: Selectors,
    tuned: dict[str, list[str]],
    bench: Bench,
    prior: Counter | None,
    by_length: bool,
) -> list[Job]:
    """What is to be run: every policy once, or once with each of its adapters."""
    common, print_of, jobs = common_settings(args, bench), cache(fingerprint), []
    for policy in policies:
        adapters = tuned[policy.name] if policy.is_tuned else selectors.paths if policy.is_local else [None]
        for number, adapter in enumerate(adapters):
            config = None if policy.trigger is None else policy.decoding_config(args)
            settings = common | {"policy": policy.label}
            if policy.num_votes and args.batch_by == "greedy_length" or by_length and policy != GREEDY:
                settings["batch_by"] = args.batch_by
            if policy.needs_teacher:
                settings["teacher_model"] = print_of(args.teacher_model)
            if policy.num_votes:
                settings |= {"temperature": args.temperature, "seed": args.seed}
            if policy.name == "prior":
                settings["prior"] = hash_of(sorted(prior.items()))
            if policy.name == "zero-shot":
                settings["zero_shot_text"] = args.zero_shot_text
            if config is not None:
                thresholds = selectors.configs[number].thresholds if policy.is_local else selectors.thresholds
                settings |= asdict(config) | {"threshold": config.resolve_threshold(thresholds)}
            if adapter is not None:
                settings["adapter"] = print_of(adapter)
            elif policy.trigger == "router":
                settings["router"] = selectors.shared.router
            seed = None if adapter is None else number
            file = Path(args.output_dir) / "records" / policy.record_name(seed)
            jobs.append(Job(policy, seed, adapter, config, settings, file))
    return jobs
