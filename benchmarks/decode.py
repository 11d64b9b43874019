"""Time of each way to select, relative to greedy decoding of the same prompts.

    python benchmarks/decode.py --json runs/benchmarks/decode.json --plot runs/benchmarks/decode.png
    python benchmarks/decode.py --quick                  # a few minutes on two cores
    python benchmarks/decode.py --model MODELS/qwen2.5-coder-0.5b

Prints a table for each batch size and prompt length, with a line for each way and a column for each share of tokens at
which the selector is asked: the median ratio over turns, [lowest, highest], and that of processor time.

    s2t_generate   custom_generate=s2t_generate; scope candidate/base is the default, sequence/adapted the paper's form
                   (the adapter merged: every token sees it)
    processor      logits_processor=S2T(selector): a cache of its own
    naive          arXiv 2604.26940, public code: K full prefixes through the adapted model at every trigger, no cache,
                   one row at a time. Favoured: the base model writes the text, the head is read at the last position
    maj8           8 sampled paths per prompt, as for a majority vote; no S2T, so it has no rate

All ways run in turn and a ratio is taken inside one turn, so that it holds when the machine's speed drifts. Steps
trigger at random, with a seed searched for so that the share of asked tokens is exactly the rate. Every way decodes
`--new_tokens` tokens. `forwards_per_token` in the JSON counts runs of the decoder: greedy has 1.0.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import setting
import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import is_flash_attn_2_available

from transformers_s2t import S2T, LocalSelector, S2TDecodingConfig, SelectorConfig, s2t_generate
from transformers_s2t.config import DEFAULT_WARMUP_TOKENS
from transformers_s2t.models.views import get_decoder


NAMES = ("s2t_generate", "processor", "naive", "maj8")  # and greedy, always
SCOPES = ("candidate/base", "sequence/base", "sequence/adapted")
NAIVE_SCOPE = "sequence/base"  # the adapter sees whole prefixes, the base model writes
SLOW = ("maj8", "naive")
NUM_PATHS = 8
WARMUP_TOKENS = DEFAULT_WARMUP_TOKENS

#: Three minutes on two cores: the width of the default shape with a quarter of its layers. `naive` at a tenth of the
#: tokens would double that.
QUICK = {"num_layers": 6, "vocab_size": 8192, "turns": 2, "new_tokens": 200}
QUICK |= {"rates": [0.01, 0.1], "batch_sizes": [1], "prefix_lengths": [256]}


class Variant(NamedTuple):
    """One way to decode. `scope` as in `SCOPES`; `scope` and `rate` are `None` where they mean nothing."""

    name: str
    scope: str | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        return self.name if self.scope is None or self.name == "naive" else f"{self.name} {self.scope}"


class Run(NamedTuple):
    """One run of a variant; turn -1 warms up and is not counted."""

    turn: int
    variant: Variant
    new_tokens: int
    config: S2TDecodingConfig | None


class Sample(NamedTuple):
    """What one run took: wall and processor seconds, runs of the decoder, (row, step) pairs that were asked."""

    wall: float
    cpu: float | None
    forwards: int
    asked: int


class CountingSelector(LocalSelector):
    """A [`LocalSelector`] that counts under "asked" the rows that it was asked about."""

    counts: Counter

    def read_scores(self, hidden_AKD: torch.Tensor) -> torch.Tensor:
        self.counts["asked"] += len(hidden_AKD)
        return super().read_scores(hidden_AKD)


class Naive(LogitsProcessor):
    """The published procedure at the random steps of `config`: every candidate's whole text, without a cache."""

    def __init__(self, selector: LocalSelector, config: S2TDecodingConfig, prompt_length: int):
        self.selector, self.config, self.prompt_length = selector, selector.resolve_config(config), prompt_length
        self.random = torch.Generator().manual_seed(config.seed)
        self.adapted = selector.views().adapted

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        fires_B = torch.rand(len(scores), generator=self.random) >= self.config.resolve_threshold(None)
        if input_ids.shape[1] - self.prompt_length < self.config.warmup_tokens:
            return scores
        for row in fires_B.nonzero()[:, 0].tolist():
            candidates_K = scores[row].topk(self.config.num_candidates).indices
            texts_KT = torch.cat([input_ids[row].expand(len(candidates_K), -1), candidates_K[:, None]], dim=-1)
            hidden_KTD = get_decoder(self.adapted)(input_ids=texts_KT, use_cache=False).last_hidden_state
            chosen = candidates_K[self.selector.read_scores(hidden_KTD[None, :, -1])[0].argmax()]
            scores[row] = float("-inf")
            scores[row, chosen] = 0.0
        return scores


def num_wanted(rate: float, new_tokens: int, batch_size: int) -> int:
    """How many (row, step) pairs the rate stands for; no more than there are after the warm-up."""
    return min(round(rate * new_tokens * batch_size), (new_tokens - WARMUP_TOKENS) * batch_size)


def find_seed(rate: float, new_tokens: int, batch_size: int, max_seeds: int = 20_000) -> int:
    """The first seed with which the "random" trigger fires at the rate exactly, in [`num_wanted`] pairs.

    Draws as a decoding session does: one `torch.rand(B)` per new token, also in the warm-up, where none counts.

    Raises:
        ValueError: where the rate stands for no pair at all, or no seed was found.
    """
    wanted = num_wanted(rate, new_tokens, batch_size)
    if wanted < 1:
        raise ValueError(
            f"a rate of {rate:g} of {new_tokens} new tokens in {batch_size} row(s) is less than one step: raise "
            "--new_tokens or --rates."
        )
    for seed in range(max_seeds):
        generator = torch.Generator().manual_seed(seed)
        values_NB = torch.stack([torch.rand(batch_size, generator=generator) for _ in range(new_tokens)])
        if int((values_NB[WARMUP_TOKENS:] >= 1.0 - rate).sum()) == wanted:
            return seed
    raise ValueError(
        f"none of {max_seeds} seeds triggers exactly {wanted} of {new_tokens * batch_size} tokens (rate {rate:g}, "
        f"batch {batch_size}, the first {WARMUP_TOKENS} steps never trigger): choose another rate or --new_tokens."
    )


def plan_variants(args: argparse.Namespace, batch_size: int) -> list[Variant]:
    """What one turn runs, in order: greedy first, what takes long last."""
    plan = [Variant("greedy")]
    for rate in args.rates:
        plan += [Variant("s2t_generate", scope, rate) for scope in args.scopes if "s2t_generate" in args.variants]
        scopes = SCOPES if args.all_scopes else SCOPES[:1]
        plan += [Variant("processor", scope, rate) for scope in scopes if "processor" in args.variants]
    plan += [Variant("maj8")] if "maj8" in args.variants and args.slow_turns else []
    if "naive" in args.variants and batch_size in args.naive_batches and args.slow_turns:
        plan += [Variant("naive", NAIVE_SCOPE, rate) for rate in args.rates if rate in args.naive_rates]
    return plan


def list_skipped(args: argparse.Namespace) -> list[str]:
    """What this run leaves out, and the flag that brings it in."""
    skipped = [f"{name} (--variants)" for name in NAMES if name not in args.variants]
    if "s2t_generate" in args.variants:
        skipped += [f"s2t_generate {scope} (--scopes)" for scope in SCOPES if scope not in args.scopes]
    if "processor" in args.variants and not args.all_scopes:
        skipped += [f"processor {scope} (--all_scopes)" for scope in SCOPES[1:]]
    if "maj8" in args.variants:
        skipped += ["maj8 (--slow_turns 1)"] * (not args.slow_turns)
    if "naive" in args.variants:
        batches = [size for size in args.batch_sizes if size not in args.naive_batches]
        skipped += ["naive (--slow_turns 1)"] * (not args.slow_turns)
        skipped += [f"naive at batch {size} (--naive_batches {size})" for size in batches]
        rates = [rate for rate in args.rates if rate not in args.naive_rates]
        skipped += [f"naive at rate {rate:g} (--naive_rates {rate:g})" for rate in rates]
    return skipped


class Bench:
    """The models of one shape, which share their base weights, and the ways to decode with them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.counts = args, Counter()
        num_positions = max(args.prefix_lengths) + args.new_tokens + WARMUP_TOKENS + 2
        self.plain = setting.make_model(args, num_positions)
        self.plain.generation_config = GenerationConfig(pad_token_id=0)  # nothing ends a text
        scopes = {variant.scope for size in args.batch_sizes for variant in plan_variants(args, size)} - {None}
        self.selectors = {scope: self._make_selector(scope) for scope in sorted(scopes)}
        for model in [self.plain, *(selector.model for selector in self.selectors.values())]:
            get_decoder(model).register_forward_hook(self._count_forward)

    def _count_forward(self, *call: Any) -> None:
        self.counts["forwards"] += 1

    def _make_selector(self, scope: str) -> CountingSelector:
        """A selector in a model of its own: other modules, but the very tensors of `self.plain`.

        Where the adapted model writes the text, the adapter is merged, into tensors of its own.
        """
        is_merged = scope == "sequence/adapted"
        shared = [] if is_merged else itertools.chain(self.plain.parameters(), self.plain.buffers())
        model = copy.deepcopy(self.plain, {id(tensor): tensor for tensor in shared})
        torch.manual_seed(0)
        vocab_size = model.config.vocab_size
        reserved = list(range(vocab_size - setting.NUM_RESERVED, vocab_size))
        lora = LoraConfig(r=16, target_modules="all-linear", trainable_token_indices={"lm_head": reserved})
        adapter_scope, proposals = scope.split("/")
        config = SelectorConfig(reserved, adapter_scope=adapter_scope, proposals=proposals)
        selector = CountingSelector(get_peft_model(model, lora).eval(), config, "default")
        selector.counts = self.counts
        return selector.merge() if is_merged else selector

    def decode(self, run: Run, prompt_BT: torch.Tensor) -> torch.Tensor:
        """Prompts and new tokens, (B, T) or, of majority voting, (8 B, T)."""
        name, selector = run.variant.name, self.selectors.get(run.variant.scope)
        model, options = self.plain if selector is None else selector.model, {"do_sample": name == "maj8"}
        if name == "maj8":
            options["num_return_sequences"] = NUM_PATHS
        elif name == "s2t_generate":
            options |= {"custom_generate": s2t_generate, "selector": selector, "decoding_config": run.config}
        elif name == "processor":
            options["logits_processor"] = S2T(selector, config=run.config)
        elif name == "naive":
            options["logits_processor"] = LogitsProcessorList([Naive(selector, run.config, prompt_BT.shape[1])])
        mask_BT = torch.ones_like(prompt_BT)
        return model.generate(input_ids=prompt_BT, attention_mask=mask_BT, max_new_tokens=run.new_tokens, **options)

    def measure(self, run: Run, prompt_BT: torch.Tensor) -> Sample:
        self.counts.clear()
        with setting.Clock(self.args.device) as clock:
            text = self.decode(run, prompt_BT)
        decoded = text.shape[1] - prompt_BT.shape[1]
        if decoded != run.new_tokens:
            raise RuntimeError(f"{run.variant.label} decoded {decoded} tokens, not {run.new_tokens}.")
        return Sample(clock.wall, clock.cpu, self.counts["forwards"], self.counts["asked"])


def runs_of_block(
    args: argparse.Namespace, batch_size: int, configs: dict[tuple[float, int], S2TDecodingConfig]
) -> Iterator[Run]:
    """Every run of a block, in order.

    The warm-up asks at every step that may trigger, of which there are two. On a CPU it leaves `naive` out: there are
    no kernels to load, and a single trigger may take as long as decoding a whole text.
    """
    plan = plan_variants(args, batch_size)
    for variant in plan:
        config = configs.get((variant.rate, batch_size))
        if variant.rate in (None, args.rates[0]) and (variant.name != "naive" or args.device == "cuda"):
            yield Run(-1, variant, WARMUP_TOKENS + 2, config and replace(config, target_rate=1.0))
    for turn, variant in itertools.product(range(args.turns), plan):
        if variant.name not in SLOW or turn < args.slow_turns:
            yield Run(turn, variant, args.new_tokens, configs.get((variant.rate, batch_size)))


def measure_block(
    bench: Bench, batch_size: int, prefix_length: int, configs: dict[tuple[float, int], S2TDecodingConfig], bar: tqdm
) -> tuple[list[dict], float]:
    """The rows of one (batch, prefix), and the median seconds of greedy decoding."""
    args = bench.args
    prompt_BT = setting.random_tokens(bench.plain.config.vocab_size, batch_size, prefix_length).to(args.device)
    samples: dict[Variant, dict[int, Sample]] = {}
    for run in runs_of_block(args, batch_size, configs):
        variant = run.variant
        bar.set_description(f"batch {batch_size}, prefix {prefix_length}, {variant.label}")
        sample = bench.measure(run, prompt_BT)
        if run.turn >= 0:
            wanted = 0 if variant.rate is None else num_wanted(variant.rate, run.new_tokens, batch_size)
            if sample.asked != wanted:
                raise RuntimeError(f"{variant.label} asked at {sample.asked} tokens, not {wanted}: not comparable.")
            samples.setdefault(variant, {})[run.turn] = sample
        bar.update()
    greedy, rows = samples[Variant("greedy")], []
    for variant, by_turn in samples.items():
        scope, proposals = variant.scope.split("/") if variant.scope else (None, None)
        pairs = [(sample, greedy[turn]) for turn, sample in by_turn.items()]
        ratios = [own.wall / base.wall for own, base in pairs]
        one, num_tokens = pairs[0][0], args.new_tokens * batch_size  # the counts are those of every turn
        row = {"name": variant.name, "scope": scope, "proposals": proposals, "rate": variant.rate}
        row |= {"batch": batch_size, "prefix": prefix_length, "dtype": args.dtype}
        row |= {"ratio": setting.median(ratios), "ratio_range": setting.edges(ratios)}
        row["cpu_ratio"] = setting.median([own.cpu and own.cpu / base.cpu for own, base in pairs])
        row["forwards_per_token"] = round(one.forwards / args.new_tokens, 4)
        row["asked_rate"] = None if variant.rate is None else round(one.asked / num_tokens, 4)
        rows.append(row | {"turns": len(pairs)})
    return rows, statistics.median(sample.wall for sample in greedy.values())


def label_of(row: dict) -> str:
    scope = None if row["scope"] is None else f"{row['scope']}/{row['proposals']}"
    return Variant(row["name"], scope).label


def format_cell(row: dict | None) -> str:
    if row is None:
        return "skipped"
    low, high = row["ratio_range"]
    spread = f" [{low:.2f}, {high:.2f}]" if row["turns"] > 1 else ""
    cpu = "" if row["cpu_ratio"] is None else f" cpu {row['cpu_ratio']:.2f}"
    return f"{row['ratio']:.2f}{spread}{cpu}"


def format_table(rows: list[dict], meta: dict) -> str:
    """One part per (batch, prefix), one line per way, one column per rate."""
    settings = meta["settings"]
    lines = [f"Time relative to greedy, {meta['shape']} with {meta['layers']} layers and a vocabulary of "
             f"{meta['vocab']}, {settings['dtype']}, K = {meta['num_candidates']}, {meta['new_tokens']} new tokens,",
             f"{meta['device']}, {meta['threads']} thread(s): median of {settings['turns']} turn(s), "
             f"maj8 and naive {settings['slow_turns']}, [min, max], cpu: of processor time"]  # fmt: skip
    for block in meta["greedy_seconds"]:
        here = [row for row in rows if all(row[name] == block[name] for name in ("batch", "prefix"))]
        labels = list(dict.fromkeys(map(label_of, here)))
        if "naive" in settings["variants"] and "naive" not in labels:
            labels.append("naive")
        by_place = {(label_of(row), row["rate"]): row for row in here}
        head = f"batch {block['batch']}, prefix {block['prefix']}, greedy {block['seconds']:.3g} s"
        asked = {row["rate"]: row["asked_rate"] for row in here}  # the same for all: `measure_block` sees to it
        cells = [[head, *(f"{100 * asked.get(rate, rate):.3g} % asked" for rate in settings["rates"])]]
        for label in labels:
            if (label, None) in by_place:
                cells.append([label, format_cell(by_place[label, None]) + " at any rate"])
            else:
                cells.append([label, *(format_cell(by_place.get((label, rate))) for rate in settings["rates"])])
        lines += ["", *setting.align(cells)]
    if meta["skipped"]:
        lines += ["", "not measured: " + ", ".join(meta["skipped"])]
    return "\n".join(lines)


PLOT_STYLES = {  # Okabe and Ito's colours
    "s2t_generate candidate/base": ("#0072B2", "o"),
    "s2t_generate sequence/base": ("#56B4E9", "v"),
    "s2t_generate sequence/adapted": ("#009E73", "^"),
    "processor candidate/base": ("#E69F00", "s"),
    "processor sequence/base": ("#B8860B", "D"),
    "processor sequence/adapted": ("#8B5A00", "P"),
    "naive": ("#D55E00", "X"),
    "maj8": ("#CC79A7", ""),
}


def draw_panel(axes: Any, rows: list[dict], labels: list[str], rates: list[float]) -> None:
    """One (batch, prefix): a group per rate, a point with its range per way, lines for what has no rate."""
    axes.axhline(1.0, color="black", linewidth=1, label="greedy")
    for row in [row for row in rows if row["name"] == "maj8"]:
        color = PLOT_STYLES["maj8"][0]
        axes.axhline(row["ratio"], color=color, linewidth=1.5, linestyle="--", label="maj8")
        axes.axhspan(*row["ratio_range"], color=color, alpha=0.2, linewidth=0)
    for place, label in enumerate(labels):
        color, marker = PLOT_STYLES[label]
        offset = 0.8 * ((place + 0.5) / len(labels) - 0.5)
        for row in [row for row in rows if label_of(row) == label]:
            x, ratio, (low, high) = rates.index(row["rate"]) + offset, row["ratio"], row["ratio_range"]
            style = {"color": color, "marker": marker, "linestyle": "none", "markersize": 5, "capsize": 2}
            axes.errorbar([x], [ratio], [[ratio - low], [high - ratio]], label=label, elinewidth=1, **style)
            shift = (0, 11 if place % 2 and len(labels) > 5 else 4)  # neighbours are often equal, and many are narrow
            style = {"color": color, "fontsize": 6, "ha": "center"}
            axes.annotate(f"{ratio:.2f}", (x, high), shift, textcoords="offset points", **style)


def plot(rows: list[dict], meta: dict, file: Path) -> None:
    """Ratios to greedy on a logarithmic axis, a panel per (batch, prefix)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from s2t_recipes.report.canvas import save_png

    settings = meta["settings"]
    batches, prefixes, rates = settings["batch_sizes"], settings["prefix_lengths"], settings["rates"]
    present = {label_of(row) for row in rows if row["rate"] is not None}
    labels = [label for label in PLOT_STYLES if label in present]
    figure = Figure(figsize=(1 + 4.5 * len(prefixes), 1.4 + 3 * len(batches)), dpi=150, layout="constrained")
    grid = figure.subplots(len(batches), len(prefixes), squeeze=False, sharex=True, sharey=True)
    for (batch, prefix), axes in zip(itertools.product(batches, prefixes), grid.flat):
        draw_panel(axes, [row for row in rows if (row["batch"], row["prefix"]) == (batch, prefix)], labels, rates)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(len(rates)), [f"{100 * rate:g} %" for rate in rates])
        axes.set_xlim(-0.5, len(rates) - 0.5)
        axes.margins(y=0.12)
        axes.set_title(f"batch {batch}, prefix {prefix}", fontsize=9)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("share of tokens at which the selector is asked", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("time / greedy", fontsize=8)
    title = (meta["shape"], settings["dtype"], f"K = {meta['num_candidates']}", meta["device"])
    figure.suptitle(", ".join(title), fontsize=9)
    found = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), fontsize=7)
    save_png(figure, file)


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--quick", help="a preset of a few minutes; flags given beside it win")
    add("--shape", default="qwen2.5-0.5b")
    add("--model")
    add("--num_layers")
    add("--vocab_size")
    add("--rates", type=setting.share, nargs="+", default=[0.01, 0.05, 0.1], help="shares of tokens asked %(default)s")
    add("--batch_sizes", least=1, nargs="+", default=[1, 8], help="prompts decoded together %(default)s")
    add("--prefix_lengths", least=1, nargs="+", default=[256, 1024], help="tokens of a prompt %(default)s")
    add("--new_tokens", least=WARMUP_TOKENS + 1, default=300, help="tokens to decode [%(default)s]")
    add("--num_candidates", least=2, default=8, help="K [%(default)s]")
    add("--turns", default=3)
    add("--variants", choices=NAMES, nargs="+", default=list(NAMES), help="ways beside greedy [all]")
    add("--scopes", choices=SCOPES, nargs="+", default=list(SCOPES), help="scopes of s2t_generate [all]")
    add("--all_scopes", action="store_true", help="time the processor in every scope, not in candidate/base only")
    add("--slow_turns", least=0, default=1, help="turns in which maj8 and naive are timed, 0: none [%(default)s]")
    add("--naive_batches", least=1, nargs="+", default=[1], help="batch sizes to time naive at %(default)s")
    add("--naive_rates", type=setting.share, nargs="+", help="rates to time naive at [all; with --quick the lowest]")
    add("--device")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--threads")
    add("--attn_implementation", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa", help="[%(default)s]")
    add("--json", help="write the figures here, again after every (batch, prefix)")
    add("--plot")
    return parser


def parse_arguments(
    argv: list[str] | None,
) -> tuple[argparse.Namespace, dict[tuple[float, int], S2TDecodingConfig]]:
    """The settings, and how each (rate, batch size) decodes; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    args = parser.read(argv, QUICK)
    for name in ("rates", "batch_sizes", "prefix_lengths", "variants", "scopes", "naive_batches"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # each once
    if args.model is not None and (args.num_layers, args.vocab_size) != (None, None):
        parser.error("--num_layers and --vocab_size are those of --model: leave them out.")
    setting.fill_in_shape(args)
    parser.check_vocabulary(args, args.num_candidates)
    if args.naive_rates is None:
        args.naive_rates = [min(args.rates)] if args.quick else args.rates
    args.slow_turns = min(args.slow_turns, args.turns)
    if args.attn_implementation == "flash_attention_2":
        if args.device != "cuda" or args.dtype == "float32":
            parser.error("--attn_implementation flash_attention_2 needs --device cuda and a 16-bit --dtype.")
        if not is_flash_attn_2_available():
            parser.error("--attn_implementation flash_attention_2 needs the package flash-attn.")
    try:
        return args, {
            (rate, size): S2TDecodingConfig(
                trigger="random",
                target_rate=rate,
                min_prob_ratio=0.0,
                num_candidates=args.num_candidates,
                seed=find_seed(rate, args.new_tokens, size),
            )
            for rate, size in itertools.product(args.rates, args.batch_sizes)
        }
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    args, configs = parse_arguments(argv)
    bench, rows = Bench(args), []
    meta = setting.machine_meta(args, "new_tokens", "num_candidates")
    meta["settings"] = setting.settings_of(args, "json", "plot", "model")
    meta |= {"skipped": list_skipped(args), "greedy_seconds": []}
    total = sum(len(list(runs_of_block(args, size, configs))) for size in args.batch_sizes) * len(args.prefix_lengths)
    with tqdm(total=total, unit="run") as bar:
        for batch_size, prefix_length in itertools.product(args.batch_sizes, args.prefix_lengths):
            block, seconds = measure_block(bench, batch_size, prefix_length, configs, bar)
            rows += block
            place = {"batch": batch_size, "prefix": prefix_length, "seconds": round(seconds, 4)}
            meta["greedy_seconds"].append(place)
            setting.write_figures(args, meta, rows)
    setting.show(format_table(rows, meta), args)
    if args.plot is not None:
        plot(rows, meta, args.plot)
        print(f"drawn in {args.plot}")


if __name__ == "__main__":
    main()
