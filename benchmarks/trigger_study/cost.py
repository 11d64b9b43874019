"""What one reading of a router costs beside a decoding step."""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import setting
import torch
from transformers import PreTrainedModel

from s2t_recipes.commands import RECIPES
from s2t_recipes.models import free_memory, load_model
from transformers_s2t import triggers
from transformers_s2t.router import HiddenTap, Router, RouterConfig, RouterHead


def median_of(function: Callable[[], object], count: int, setup: Callable[[], object] | str = "pass") -> float:
    """Median milliseconds of some calls; `setup` runs before each, untimed."""
    return 1000 * statistics.median(timeit.repeat(function, setup, number=1, repeat=count))


def time_readings(
    model: PreTrainedModel, batch_size: int, prefix_length: int, turns: int, repeats: int
) -> dict[str, Any]:
    """A row: medians over turns, in milliseconds, of a decoding step, a reading of a router and an entropy; ratios to
    the step within a turn."""
    config = model.config.get_text_config()
    router_config = RouterConfig(config.hidden_size, config.num_hidden_layers)
    torch.manual_seed(0)
    router = Router(model, RouterHead(router_config), router_config)
    ids_BT = torch.randint(3, config.vocab_size, (batch_size, prefix_length + 1))
    samples: dict[str, list[float]] = {"step": [], "router": [], "entropy": []}
    with torch.no_grad(), HiddenTap(router.read) as tap:
        past = model(ids_BT[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

        def step() -> torch.Tensor:
            return model(ids_BT[:, -1:], past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]

        logits_BV = step()
        hidden_BD = tap.hidden.take()[:, -1]
        for _ in range(turns + 1):
            samples["step"].append(median_of(step, repeats, setup=lambda: past.crop(-1)))  # the step before
            samples["router"].append(median_of(lambda: router.logits(hidden_BD, logits_BV), 5 * repeats))
            samples["entropy"].append(median_of(lambda: triggers.entropy(logits_BV), 5 * repeats))
    row: dict[str, Any] = {"batch": batch_size, "prefix": prefix_length, "turns": turns}
    row |= {"layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab": config.vocab_size}
    for name, values in samples.items():
        row[f"{name}_milliseconds"] = setting.median(values[1:])  # the first turn warms up
        if name != "step":
            ratios = [value / step for value, step in zip(values[1:], samples["step"][1:])]
            row |= {f"{name}_ratio": setting.median(ratios, 5), f"{name}_ratio_range": setting.edges(ratios, 5)}
    return row


def measure_cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a random model of the shape of Qwen2.5-0.5B with its whole vocabulary, and of the embedded student."""
    flags = argparse.Namespace(shape="qwen2.5-0.5b", num_layers=args.cost_layers, dtype="float32", device="cpu")
    flags.vocab_size = None if args.quick else 151936
    setting.fill_in_shape(flags)
    repeats = 3 if flags.num_layers > 4 else 10
    model = setting.random_model(flags, num_positions=512, eos_token_id=None)
    common = {"model": f"{flags.shape}, random weights", "dtype": "float32"}
    rows = [common | time_readings(model, batch_size, 256, args.turns, repeats) for batch_size in (1, 8)]
    del model
    free_memory()
    model = load_model(str(RECIPES / "embedded" / "student"), "float32", torch.device("cpu"))
    common = {"model": "embedded student", "dtype": "float32"}
    return rows + [common | time_readings(model, batch_size, 48, args.turns, repeats=50) for batch_size in (1, 8)]
