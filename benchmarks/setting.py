"""What the benchmarks share: models of a given shape, flags and their limits, a clock, medians over turns, tables."""

from __future__ import annotations

import argparse
import importlib.util
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from transformers_s2t.files import write_json


# vocabulary: that of `tiny` and `qwen2.5-0.5b` is cut, because a head of 151936 rows would hide the layers
SHAPES = {
    "tiny": (64, 192, 4, 2, 1, 1000),
    "tiny-wide": (128, 384, 4, 4, 2, 1000),  # teachers: twice as wide
    "small": (512, 1408, 8, 8, 2, 32000),
    "small-wide": (1024, 2816, 8, 16, 4, 32000),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 32768),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
}
SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE_FIELDS += ("num_key_value_heads", "vocab_size")

NUM_RESERVED = 16
FIRST_TOKEN = 3  # first id of a text: 0 is padding, 1 begins a text, 2 ends it


def random_model(args: argparse.Namespace, num_positions: int, eos_token_id: int | None) -> PreTrainedModel:
    """A Qwen2 of `args.shape` with random weights, the same at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **dict(zip(SHAPE_FIELDS, SHAPES[args.shape]))
        | {"vocab_size": args.vocab_size, "num_hidden_layers": args.num_layers},
        max_position_embeddings=num_positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=eos_token_id,
    )
    attention = getattr(args, "attn_implementation", "sdpa")
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation=attention)
    return model.eval().to(args.device)


def load_checkpoint(args: argparse.Namespace, name: str) -> PreTrainedModel:
    """The model of a folder or Hub id, in the type and on the device of the flags."""
    attention = getattr(args, "attn_implementation", None)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    return model.eval().to(args.device)


def make_model(args: argparse.Namespace, num_positions: int) -> PreTrainedModel:
    """The model of `--model`, or a random one that never ends a text."""
    if args.model is not None:
        return load_checkpoint(args, args.model)
    return random_model(args, num_positions, eos_token_id=None)


def random_tokens(vocab_size: int, *shape: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Ids that texts are made of, neither special nor reserved; the same at every call without a generator."""
    generator = torch.Generator().manual_seed(1) if generator is None else generator
    return torch.randint(FIRST_TOKEN, vocab_size - NUM_RESERVED, shape, generator=generator)


def fill_in_shape(args: argparse.Namespace) -> None:
    """Layers and vocabulary where no flag says otherwise."""
    if getattr(args, "model", None) is not None:
        config = AutoConfig.from_pretrained(args.model).get_text_config()
        args.num_layers, args.vocab_size = config.num_hidden_layers, config.vocab_size
        args.shape = Path(args.model).name
        return
    own = dict(zip(SHAPE_FIELDS, SHAPES[args.shape]))
    args.vocab_size = own["vocab_size"] if args.vocab_size is None else args.vocab_size
    args.num_layers = own["num_hidden_layers"] if args.num_layers is None else args.num_layers


# Flags


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Type of a flag with numbers from `least` to `most`."""

    def read(text: str) -> Any:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}.")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}.")
        return value

    read.__name__ = kind.__name__  # argparse names the type where `text` is no number
    return read


def share(text: str) -> float:
    """Type of a flag with shares of the tokens."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {value}.")
    return value


def new_file(text: str) -> Path:
    """Type of a flag that names a file to write."""
    file = Path(text)
    if file.is_dir() or any(up.exists() and not up.is_dir() for up in file.parents):
        raise argparse.ArgumentTypeError(f"must name a file that can be written, got {text!r}.")
    return file


def new_picture(text: str) -> Path:
    """Type of a flag that names a picture to draw."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("must not be given without matplotlib: pip install matplotlib.")
    return new_file(text)


#: What a flag means in every script that has it.
FLAGS: dict[str, dict[str, Any]] = {
    "--quick": {"action": "store_true"},
    "--model": {"help": "a checkpoint to take the weights of, in place of random ones: Hub id or folder"},
    "--shape": {"choices": sorted(SHAPES), "help": "shape of the random model [%(default)s]"},
    "--num_layers": {"least": 1, "help": "layers of the random model [the shape's own]"},
    "--vocab_size": {"type": int, "help": "rows of the head [the shape's own; qwen2.5-0.5b: cut to 32768]"},
    "--turns": {"least": 1, "help": "how often everything is timed [%(default)s]"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu", "help": "[%(default)s]"},
    "--dtype": {"default": "float32", "help": "type of the weights [%(default)s]"},
    "--threads": {"least": 1, "help": "threads of the CPU [torch's default]"},
    "--json": {"type": new_file, "metavar": "FILE", "help": "write the figures here"},
    "--plot": {"type": new_picture, "metavar": "FILE.png", "help": "draw the figures"},
}


class Parser(argparse.ArgumentParser):
    """Says what a script is for, or in one line what is wrong with a flag.

    Args:
        file: path of the script.
        opening: how `--help` begins.
    """

    def __init__(self, file: str, opening: str):
        super().__init__(prog=Path(file).name)
        self.opening = opening.strip()

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's, with the options that `FLAGS` has of this flag, and the limits `least` and `most`."""
        options = FLAGS.get(names[0], {}) | options
        least, most = options.pop("least", None), options.pop("most", math.inf)
        if least is not None:
            options["type"] = number(options.get("type", int), least, most)
        return super().add_argument(*names, **options)

    def read(self, argv: Sequence[str] | None, quick: dict[str, Any]) -> argparse.Namespace:
        """The settings; those of the preset `quick` where `--quick` is given and no other flag says otherwise.

        Also sets the threads of torch.
        """
        if self.parse_args(argv).quick:
            self.set_defaults(**quick)
        args = self.parse_args(argv)
        if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch sees no CUDA device here.")
        if getattr(args, "threads", None) is not None:
            torch.set_num_threads(args.threads)
        return args

    def check_vocabulary(self, args: argparse.Namespace, num_candidates: int) -> None:
        """Ends the program where the random model's vocabulary has fewer text tokens than candidates are drawn."""
        least = FIRST_TOKEN + num_candidates + NUM_RESERVED
        if args.vocab_size is not None and args.vocab_size < least:
            self.error(f"--vocab_size must be at least {least}, got {args.vocab_size}.")

    def format_help(self) -> str:
        return f"{self.opening}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+): must", r"\1 must", message)
        self.exit(2, f"{self.prog}: {message}\n")


# What is measured


class Clock:
    """Seconds of a `with` block: `wall`, and on a CPU `cpu`, which does not depend on what else the machine does."""

    wall: float
    cpu: float | None

    def __init__(self, device: str | torch.device = "cpu"):
        self.on_cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> Clock:
        if self.on_cuda:
            torch.cuda.synchronize()
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - self.began[0]
        self.cpu = None if self.on_cuda else time.process_time() - self.began[1]


def median(values: Sequence[float | None], digits: int = 4) -> float | None:
    """Rounded median over turns; `None` where a value is missing, as processor time is on a GPU."""
    return None if None in values else round(statistics.median(values), digits)


def edges(values: Sequence[float], digits: int = 4) -> list[float]:
    """Rounded lowest and highest value over turns."""
    return [round(min(values), digits), round(max(values), digits)]


# What is said


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_meta(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What a figure depends on beside its own settings, and the named ones of these."""
    return {
        "shape": args.shape,
        "layers": args.num_layers,
        "vocab": args.vocab_size,
        "threads": torch.get_num_threads(),
        "device": device_name(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    } | {name: getattr(args, name) for name in names}


def settings_of(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """All flags but those that name places of this machine."""
    return {name: value for name, value in vars(args).items() if name not in without}


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns. The last cell of a line that is shorter than others may be wider than its column."""
    longest = max(map(len, lines))
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) == longest))]
    widths[0] = max(len(line[0]) for line in lines)
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def write_figures(args: argparse.Namespace, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes meta and rows where `--json` names a file."""
    if args.json is not None:
        write_json(args.json, {"meta": meta, "rows": rows})


def show(table: str, args: argparse.Namespace) -> None:
    """Prints a table, and where its figures were written."""
    print(f"\n{table}")
    if args.json is not None:
        print(f"\nwritten to {args.json}")
