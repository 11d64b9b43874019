"""What training changed elsewhere: how far a model has moved from the base model on text that it was not trained for.

    python recipes/retention.py --model M --labels runs/demo/labels/test --text other.jsonl \
        --tuned sft=FOLDER kd=FOLDER --adapters runs/demo/adapter-seed0 runs/demo/adapter-seed1 --output X.json

Per token, in nats: KL(base || model), and the model's own loss, on three kinds of text:

    generated    what the base model itself wrote, in the trajectories of the labels
    prompts      the prompts of these
    text         anything that has nothing to do with the task: problems as `s2t eval` reads them (their
                 prompts), or a .txt file with one document per line

Measured are the base model itself (loaded once more, so its zeros are measured too), adapters that write text
themselves (s2t imitate), and S2T-Local selectors in the state in which they write text. With
proposals="base" the base model writes it, and nothing may differ; that is not assumed, the text goes through the model
that holds the adapter. Reserved tokens are left out of every distribution, and not counted in a text. Problems that an
adapter has seen are refused.

Legend: B rows, T tokens, S positions, V vocabulary, D documents, P seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.hf_argparser import HfArg

from s2t_recipes.adapters import check_model, check_same_tokenizer, check_tuned, merge_adapter
from s2t_recipes.commands import typed_command
from s2t_recipes.estimates import bootstrap_interval
from s2t_recipes.evaluation.plan import check_folder
from s2t_recipes.evaluation.policies import parse_tuned
from s2t_recipes.evaluation.rows import align, versions
from s2t_recipes.models import DTYPES, default_device, free_memory, load_model, load_quietly
from s2t_recipes.options import Parser, check_least
from s2t_recipes.problems import Problem, encode_prompts, load_problems
from transformers_s2t import LocalSelector, SelectorConfig
from transformers_s2t.config import check_choice
from transformers_s2t.files import write_json
from transformers_s2t.fingerprints import model_hash, same_weights, weights_name
from transformers_s2t.labels.folder import read_held_out_labels
from transformers_s2t.labels.schema import CORRECTED_ROLLOUTS, TrajectoryHeader
from transformers_s2t.labels.seen_problems import STAGES, check_unseen
from transformers_s2t.model_checks import context_length
from transformers_s2t.models.forwards import head_rows, logits_from
from transformers_s2t.proposals import exclude
from transformers_s2t.reserved_tokens import vocab_hash
from transformers_s2t.triggers import kl_divergence


KINDS = ("generated", "prompts", "text")
MAX_LOGITS = 1 << 28  # of both models at once; in float32 a gigabyte
MAX_FLOAT_LOGITS = 1 << 24  # of one model, in float32, while they are compared
DEFINITIONS = {
    "kl": "KL(base || model) per token, nats, over the vocabulary without reserved tokens",
    "loss": "cross-entropy of the text's next token, nats per token; the first token of a document is not predicted",
    "loss_change": "loss minus that of the base model on the same documents (paired)",
    "value, ci, by_seed": "mean over all tokens and seeds; 95 % bootstrap over documents (of generated text and "
    "prompts: problems), each with the weight of its tokens; the mean of each seed where there are several",
}


@dataclass
class RetentionArguments:
    """What is compared with the base model, and on what.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    model: str = HfArg(help="Base model: a Hub id or a local folder.")
    labels: str = HfArg(help="Labels of held-out prompts, with text that the base model wrote.")
    text: str = HfArg(help="Other text: a .jsonl, .json, .parquet or .txt file, a folder of files, or a Hub id.")
    tuned: list[str] = HfArg(
        default_factory=list,
        help="Adapters that write text themselves, as name=folder; the same name again is another seed.",
    )
    adapters: list[str] = HfArg(default_factory=list, help="S2T-Local adapters, one per selector seed.")
    output: str | None = HfArg(default=None, help="JSON file to write.")
    text_column: str = HfArg(default="prompt", help="Column with the text; not for a .txt file.")
    text_split: str | None = HfArg(default=None, help="Split of a folder or a Hub id.")
    text_limit: int = HfArg(default=200, help="Number of documents of `text`, the first ones.")
    max_length: int = HfArg(default=256, help="Number of tokens of each document, the first ones.")
    batch_size: int = HfArg(default=32, help="Texts per forward, fewer where they are long.")
    dtype: str = HfArg(default="auto", help="Type of the weights; auto: float32 on a CPU.")
    seed: int = HfArg(default=0, help="Seed of the intervals.")

    def __post_init__(self):
        check_least(self, text_limit=1, max_length=2, batch_size=1)
        check_choice("dtype", self.dtype, DTYPES)
        if not self.tuned and not self.adapters:
            raise ValueError("`tuned` or `adapters` must name at least one adapter to compare with the base model.")
        if taken := {"base", "s2t-local-adapted"} & set(parse_tuned(self.tuned)):
            raise ValueError(f"`tuned` must not be named {taken.pop()!r}: another row is.")
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"`output` must be a file, got the folder {self.output!r}.")


@dataclass(frozen=True)
class Document:
    """A text and the tokens of it that count.

    Attributes:
        id: documents of one id are resampled together.
        token_ids: the whole text.
        spans: kind -> first token and the one behind the last.
    """

    id: str
    token_ids: list[int]
    spans: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Row:
    """A row of the table: `kind` is "base", "tuned" or "selector", `sources` are its adapters, one per seed."""

    name: str
    kind: str
    sources: list[str | None]


#: kind -> id -> sums of KL and loss, and number of tokens.
Sums = dict[str, dict[str, np.ndarray]]


def read_label_documents(args: RetentionArguments) -> tuple[list[Document], TrajectoryHeader]:
    """Prompts and what the base model wrote. A prompt with several rollouts counts once.

    Raises:
        FileNotFoundError: where there are no labels.
        ValueError: for labels without a header, or whose text was not written by the base model alone.
    """
    labels, header = read_held_out_labels(args.labels)
    if header is None:
        raise ValueError(f"`labels` {args.labels!r} have no header: make them with `s2t label`.")
    if header.rollout in CORRECTED_ROLLOUTS:
        raise ValueError(
            f"`labels` {args.labels!r} hold text that a selector corrected (rollout {header.rollout!r}), not the base "
            "model's own: label with --rollout_policy greedy or sample."
        )
    documents, known = [], set()
    for id, ids, start in zip(labels["problem_id"], labels["input_ids"], labels["prompt_length"]):
        spans = {"generated": (start, len(ids))} | ({} if id in known else {"prompts": (1, start)})
        known.add(id)
        documents.append(Document(id, ids, spans))
    return documents, header


def read_text(args: RetentionArguments) -> list[Problem]:
    """The documents of `text`.

    Raises:
        FileNotFoundError: where there is no such file, folder or data set.
        ValueError: where it cannot be read, or is empty.
    """
    path = Path(args.text).expanduser()
    try:
        if path.suffix != ".txt":
            return load_problems(args.text, args.text_split, args.text_column, None, args.text_limit)
        if not path.is_file():
            raise FileNotFoundError(f"`text`: there is no file {args.text!r}.")
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"`text`: {args.text} is not UTF-8: {error}") from None
    except (FileNotFoundError, ValueError) as error:
        message = str(error)
        for theirs, ours in {"dataset": "text", "split": "text_split", "prompt_column": "text_column"}.items():
            message = message.replace(f"`{theirs}`", f"`{ours}`")
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(message) from None
    lines = list(dict.fromkeys(line for line in lines if line.strip()))
    if not lines:
        raise ValueError(f"`text`: {args.text} is empty, it holds no document.")
    return [Problem(hashlib.sha256(line.encode()).hexdigest()[:16], line, None) for line in lines[: args.text_limit]]


def load_model_of(args: RetentionArguments, row: Row, source: str | None, device: torch.device) -> PreTrainedModel:
    """A model as it writes text."""
    model = load_model(args.model, args.dtype, device)
    if row.kind == "selector":
        selector = LocalSelector.from_pretrained(source, model)
        return selector.writer(selector.views())
    return merge_adapter(model, source, "tuned") if row.kind == "tuned" else model


@torch.no_grad()
def compare(
    base: PreTrainedModel, model: PreTrainedModel, sequences: Sequence[list[int]], excluded: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """KL(base || model), the model's loss and whether it counts, at every token (T - 1) but the first of each text.

    Args:
        base, model: on one device.
        sequences: texts, which go through each model at once.
        excluded: tokens that are no text.
    """
    base_BTV = logits_from(base, sequences, 0)
    model_BTV = logits_from(model, sequences, 0)
    shared = min(base_BTV.shape[-1], model_BTV.shape[-1])
    excluded = excluded[excluded < shared].to(base_BTV.device)
    chunk = max(1, MAX_FLOAT_LOGITS // shared)
    for b, ids in enumerate(sequences):
        targets_T = torch.tensor(ids[1:], device=base_BTV.device)
        parts = []
        for start in range(0, len(targets_T), chunk):
            targets_S = targets_T[start : start + chunk]
            where = slice(start, start + len(targets_S))
            base_SV, model_SV = (
                exclude(logits_BTV[b, where, :shared].float(), excluded) for logits_BTV in (base_BTV, model_BTV)
            )
            loss_S = torch.nn.functional.cross_entropy(model_SV, targets_S, reduction="none")
            parts.append((kl_divergence(base_SV, model_SV), loss_S, ~torch.isin(targets_S, excluded)))
        yield tuple(torch.cat(column).cpu() for column in zip(*parts))


def add_up(
    base: PreTrainedModel,
    model: PreTrainedModel,
    documents: Sequence[Document],
    excluded: torch.Tensor,
    batch_size: int,
    progress: tqdm,
) -> Sums:
    """Sums over the tokens of each document; a batch at a time, the longest first."""
    order = sorted(documents, key=lambda document: -len(document.token_ids))
    num_rows = head_rows(base) + head_rows(model)
    totals: Sums = {kind: {} for kind in KINDS}
    while order:
        size = max(1, min(batch_size, MAX_LOGITS // (len(order[0].token_ids) * num_rows)))
        batch, order = order[:size], order[size:]
        texts = [document.token_ids for document in batch]
        for document, (kl_T, loss_T, counts_T) in zip(batch, compare(base, model, texts, excluded)):
            for kind, (start, end) in document.spans.items():
                predicted = slice(start - 1, end - 1)  # index t - 1 is of the token t
                keep_S = counts_T[predicted]
                sums = [values_T[predicted][keep_S].double().sum() for values_T in (kl_T, loss_T)]
                by_id = totals[kind]
                by_id[document.id] = by_id.get(document.id, 0) + np.array([*map(float, sums), int(keep_S.sum())])
        progress.update(len(batch))
    return {kind: {id: sums for id, sums in by_id.items() if sums[2]} for kind, by_id in totals.items()}


def summarize(runs: list[Sums], base: Sums | None, seed: int) -> dict[str, dict | None]:
    """Figures of each kind of text, mean over the seeds; `None` for a kind without a token.

    `base` are the base model's sums, for the change of the loss; `None` where `runs` are of the base model itself.
    """
    figures = {}
    for kind in KINDS:
        if not runs[0][kind]:
            figures[kind] = None
            continue
        sums_PD3 = np.array([list(run[kind].values()) for run in runs])
        tokens_D = sums_PD3[0, :, 2]
        values = {"kl": sums_PD3[..., 0] / tokens_D, "loss": sums_PD3[..., 1] / tokens_D}
        if base is not None:
            values["loss_change"] = values["loss"] - np.array(list(base[kind].values()))[:, 1] / tokens_D
        figures[kind] = {}
        for name, values_PD in values.items():
            by_seed = [float(np.average(values_D, weights=tokens_D)) for values_D in values_PD]
            ci = bootstrap_interval(values_PD.mean(0), seed, weights_N=tokens_D)
            figures[kind][name] = {"value": float(np.mean(by_seed)), "ci": ci}
            if len(by_seed) > 1:
                figures[kind][name]["by_seed"] = by_seed
    return figures


def make_rows(args: RetentionArguments, header: TrajectoryHeader, problem_ids: dict[str, list[str]]) -> list[Row]:
    """The rows of the table; selectors whose text the adapted model writes get one of their own.

    Args:
        args, header: arguments, and header of the labels.
        problem_ids: argument -> ids of its texts, none of which an adapter may have seen.

    Raises:
        FileNotFoundError: where there is no such adapter.
        ValueError: for one that has seen a text, is no adapter, or is of another tokenizer.
    """
    tuned = parse_tuned(args.tuned)
    sources = [("tuned", path) for paths in tuned.values() for path in paths]
    for argument, path in [*sources, *(("adapters", path) for path in args.adapters)]:
        check_folder(argument, path)
        for what, ids in problem_ids.items():
            check_unseen(path, ids, STAGES, what)
        if argument == "tuned":
            check_tuned(argument, path, "name it in `adapters`")
    rows = {name: Row(name, "tuned", sources) for name, sources in tuned.items()}
    for path in args.adapters:
        config = SelectorConfig.from_pretrained(path)
        check_same_tokenizer(args.labels, header, config)
        name = "s2t-local" if config.proposals == "base" else "s2t-local-adapted"
        rows.setdefault(name, Row(name, "selector", [])).sources.append(path)
    return [Row("base", "base", [None]), *rows.values()]


def measure(args: RetentionArguments) -> dict:
    """Compares everything with the base model; returns the report."""
    # 1. everything that can be wrong, before a model is loaded
    for name in ("model", "labels"):
        check_folder(name, getattr(args, name))
    check_model("model", args.model)
    written, header = read_label_documents(args)
    texts = read_text(args)
    ids = {"labels": [document.id for document in written], "text": [text.id for text in texts]}
    rows = make_rows(args, header, ids)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if vocab_hash(tokenizer) != header.vocab_hash:
        raise ValueError(f"`labels` {args.labels!r} were made with another tokenizer than that of {args.model!r}.")
    longest = context_length(AutoConfig.from_pretrained(args.model))
    if longest is not None and args.max_length > longest:
        raise ValueError(f"`max_length` must be at most {longest}, the model's context, got {args.max_length}.")
    others = [
        Document(text.id, token_ids[: args.max_length], {"text": (1, min(len(token_ids), args.max_length))})
        for text, token_ids in zip(texts, encode_prompts(tokenizer, [text.prompt for text in texts]))
        if len(token_ids) > 1
    ]
    if not others:
        raise ValueError(f"`text`: {args.text} holds no document of two tokens or more.")
    documents = [*written, *others]
    selectors = [SelectorConfig.from_pretrained(path) for path in args.adapters]
    excluded_ids = set(header.excluded_ids).union(*(config.reserved_token_ids for config in selectors))
    excluded = torch.tensor(sorted(excluded_ids), dtype=torch.long)

    # 2. one model at a time beside the base model
    device = default_device()
    base = load_model(args.model, args.dtype, device)
    weights = model_hash(base)
    if not same_weights(header.model_hash, weights):
        raise ValueError(
            f"`labels` {args.labels!r} hold text of {header.model!r} (weights {weights_name(header.model_hash)}), but "
            f"{args.model!r} has weights {weights_name(weights)}: they are not its own."
        )
    runs: dict[str, list[Sums]] = {row.name: [] for row in rows}
    total = len(documents) * sum(len(row.sources) for row in rows)
    with tqdm(total=total, unit="document", smoothing=0.05) as bar:
        for row in rows:
            for number, source in enumerate(row.sources):
                bar.set_description(f"{row.name} {number}" if len(row.sources) > 1 else row.name)
                model = load_model_of(args, row, source, device)
                runs[row.name].append(add_up(base, model, documents, excluded, args.batch_size, bar))
                del model
                free_memory()

    # 3. the report
    (of_base,) = runs["base"]
    return {
        "meta": {
            "model": args.model,
            "labels": args.labels,
            "text": args.text,
            "documents": {
                kind: {"documents": len(by_id), "tokens": int(sum(sums[2] for sums in by_id.values()))}
                for kind, by_id in of_base.items()
            },
            "excluded_ids": excluded.tolist(),
            "definitions": DEFINITIONS,
            "settings": asdict(args),
            "device": str(device),
            "versions": versions(),
            "command": typed_command(),
        },
        "rows": [
            {
                "name": row.name,
                "adapters": [source for source in row.sources if source is not None],
                "num_seeds": len(row.sources),
                **summarize(runs[row.name], None if row.kind == "base" else of_base, args.seed),
            }
            for row in rows
        ],
    }


def format_table(report: dict) -> str:
    """The rows of a report as aligned plain text."""
    columns = [("kl", kind) for kind in KINDS] + [("loss", kind) for kind in ("generated", "text")]
    lines = [("model", *(f"{'KL' if name == 'kl' else name}, {kind}" for name, kind in columns))]
    for row in report["rows"]:
        cells = []
        for name, kind in columns:
            if row[kind] is None:
                cells.append("-")
                continue
            figures = row[kind][name]
            cells.append("{:.4f} [{:.4f}, {:.4f}]".format(figures["value"], *figures["ci"]))
        lines.append((row["name"] + (f" (x{row['num_seeds']})" if row["num_seeds"] > 1 else ""), *cells))
    text = align(lines)
    counts = ", ".join(
        f"{kind} {found['tokens']} tokens of {found['documents']} documents"
        for kind, found in report["meta"]["documents"].items()
    )
    notes = [
        "KL(base || model) and loss in nats per token, 95 % intervals over documents. (xN): mean of N seeds.",
        f"{counts}; model {report['meta']['model']}.",
    ]
    return "\n".join([*text, "", *notes])


def main(argv: list[str] | None = None) -> None:
    load_quietly()
    (args,) = Parser(RetentionArguments).parse_args_and_config(argv)
    report = measure(args)
    print()
    print(format_table(report))
    if args.output is not None:
        print(f"\nwritten to {write_json(Path(args.output), report)}")
