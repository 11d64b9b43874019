"""What one reading of a router costs beside a decoding step."""

from __future__ import annotations

import argparse
import gc
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import torch
from setting import SHAPES, random_model
from transformers import PreTrainedModel

from s2t_recipes.commands import RECIPES
from s2t_recipes.models import load_model
from transformers_s2t import triggers
from transformers_s2t.router import HiddenTap, Router, RouterConfig, RouterHead


def median_of(function: Callable[[], object], count: int, setup: Callable[[], object] | str = "pass") -> float:
    """Median seconds of some calls; `setup` runs before each, untimed."""
    return statistics.median(timeit.repeat(function, setup, number=1, repeat=count))


def time_turns(
    model: PreTrainedModel, batch_size: int, prefix_length: int, turns: int, repeats: int
) -> list[tuple[float, float, float]]:
    """Seconds of one decoding step, one reading of a router and one entropy, turn by turn."""
    config = model.config.get_text_config()
    router_config = RouterConfig(config.hidden_size, config.num_hidden_layers)
    torch.manual_seed(0)
    router = Router(model, RouterHead(router_config), router_config)
    ids_BT = torch.randint(3, config.vocab_size, (batch_size, prefix_length + 1))
    samples = []
    with torch.no_grad(), HiddenTap(router.read) as tap:
        past = model(ids_BT[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

        def step() -> torch.Tensor:
            return model(ids_BT[:, -1:], past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]

        logits_BV = step()
        hidden_BD = tap.hidden.take()[:, -1]
        for _ in range(turns + 1):
            seconds = median_of(step, repeats, setup=lambda: past.crop(-1))  # the step before
            reading = median_of(lambda: router.logits(hidden_BD, logits_BV), 5 * repeats)
            samples.append((seconds, reading, median_of(lambda: triggers.entropy(logits_BV), 5 * repeats)))
    return samples[1:]  # the first one warms up


def time_readings(
    model: PreTrainedModel, batch_size: int, prefix_length: int, turns: int, repeats: int
) -> dict[str, Any]:
    """A row of medians over turns, in milliseconds; ratios within a turn."""
    config = model.config.get_text_config()
    samples = time_turns(model, batch_size, prefix_length, turns, repeats)
    row: dict[str, Any] = {"batch": batch_size, "prefix": prefix_length, "turns": turns}
    row |= {"layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab": config.vocab_size}
    row["step_milliseconds"] = round(1000 * statistics.median(sample[0] for sample in samples), 4)
    for place, name in ((1, "router"), (2, "entropy")):
        ratios = [sample[place] / sample[0] for sample in samples]
        row[f"{name}_milliseconds"] = round(1000 * statistics.median(sample[place] for sample in samples), 4)
        row[f"{name}_ratio"] = round(statistics.median(ratios), 5)
        row[f"{name}_ratio_range"] = [round(min(ratios), 5), round(max(ratios), 5)]
    return row


def measure_cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of a random model of the shape of Qwen2.5-0.5B with its whole vocabulary, and of the embedded student."""
    shape = "qwen2.5-0.5b"
    layers = SHAPES[shape][2] if args.cost_layers is None else args.cost_layers
    settings = argparse.Namespace(shape=shape, num_layers=layers, vocab_size=151936, dtype="float32", device="cpu")
    if args.quick:
        settings.vocab_size = SHAPES[shape][-1]
    rows = []
    model = random_model(settings, num_positions=512, eos_token_id=None)
    for batch_size in (1, 8):
        found = time_readings(model, batch_size, 256, args.turns, repeats=3 if layers > 4 else 10)
        rows.append({"model": f"{shape}, random weights", "dtype": "float32", **found})
    del model
    gc.collect()
    model = load_model(str(RECIPES / "embedded" / "student"), "float32", torch.device("cpu"))
    for batch_size in (1, 8):
        found = time_readings(model, batch_size, 48, args.turns, repeats=50)
        rows.append({"model": "embedded student", "dtype": "float32", **found})
    return rows
