"""Trains a router: a light head on the small model that says at which tokens to ask the selector, without a teacher.

    s2t route --adapter runs/demo/adapter-seed0 --labels runs/demo/labels/label --eval_labels runs/demo/labels/tuning

Works from stored labels and one reading of their trajectories by the small model; minutes on a CPU for small models.
The router lies beside the adapter (s2t_router.safetensors), where LocalSelector.from_pretrained finds it. Then run
`s2t calibrate`: thresholds and fusion weights of a router are its own.

It predicts one of three things, and `--target` says which: that the teacher's best candidate above the floor gains
more than `--min_gain` nats over the first one ("gain"), that it is another one than the first ("differs"), or
KL(teacher || student) itself ("kl").

It depends on the model, the labels and the seed, not on the selector. So another adapter of the same model, where the
same router would be trained, can take it, within a second:

    s2t route --adapter runs/demo/other-adapter --router_of runs/demo/adapter-seed0
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers.hf_argparser import HfArg

from s2t_recipes.adapters import (
    base_model_of,
    check_model,
    check_same_tokenizer,
    check_trained_on,
    open_adapter,
    still_calibrated,
)
from s2t_recipes.models import default_device, load_model
from s2t_recipes.options import Parser, check_least
from transformers_s2t import SelectorConfig
from transformers_s2t.calibration.router_training import collect, default_layers, fit_router, trigger_metrics
from transformers_s2t.config import CALIBRATION_NAME, ROUTER_WEIGHTS_NAME, S2T_CONFIG_NAME, check_choice
from transformers_s2t.files import atomic_write
from transformers_s2t.fingerprints import same_weights, weights_name
from transformers_s2t.labels.folder import label_splits, read_labels, share_of
from transformers_s2t.labels.seen_problems import read_seen_problems, write_seen_problems
from transformers_s2t.router import ROUTER_TARGETS, RouterConfig, num_layers
from transformers_s2t.selector_card import CARD_NAME, without_calibration


#: Settings of an adapter that training a router reads.
SETTINGS = ("min_prob_ratio", "warmup_tokens", "reserved_token_ids")


@dataclass
class RouterArguments:
    """What is trained, and on what; or from where it is taken.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    adapter: str = HfArg(help="Folder of the trained adapter; the router is written beside it.")
    labels: str | None = HfArg(
        default=None,
        help="Folder written by `s2t label`, or a Hub data set; the adapter's own will do. Needed unless `router_of` "
        "is given.",
    )
    eval_labels: str | None = HfArg(
        default=None,
        help="Labels of other problems, which choose layer and epoch (default: the split 'validation' of `labels`, or "
        "a fifth of its problems).",
    )
    router_of: str | None = HfArg(
        default=None,
        help="Adapter whose router is taken instead of training the same one again: a router depends on the model, "
        "the labels and the seed, not on the selector. Not with `labels`; options of training are not read.",
    )
    model: str | None = HfArg(default=None, help="Base model (default: the one that the adapter names).")
    target: str = HfArg(default="gain", help="What is predicted: 'gain', 'differs' or 'kl'.")
    min_gain: float = HfArg(default=0.5, help="Least gain that counts for the target 'gain', in nats.")
    layers: list[int] | None = HfArg(
        default=None, help="Layers to try, from 1 (default: five, evenly spread, the last layer among them)."
    )
    width: int = HfArg(default=64, help="Width of the head's hidden layer.")
    num_top: int = HfArg(default=8, help="Number of log-probabilities among the features.")
    learning_rate: float = HfArg(default=2e-3, help="Learning rate of AdamW, above 0.")
    num_epochs: int = HfArg(default=30, help="Largest number of epochs; the best one by held-out loss is kept.")
    max_steps: int | None = HfArg(
        default=None, help="Largest number of the head's steps, as whole epochs, but one epoch at least."
    )
    head_batch_size: int = HfArg(default=512, help="Positions per step of the head.")
    max_positions: int = HfArg(
        default=200_000, help="Number of positions held in memory; a random share where there are more."
    )
    batch_size: int = HfArg(default=32, help="Trajectories per forward of the model.")
    dtype: str = HfArg(default="auto", help="Type of the weights, the one that is deployed.")
    seed: int = HfArg(default=0, help="Seed of the head's first weights and the order of positions.")
    overwrite: bool = HfArg(default=False, help="Train again where the adapter has a router.")

    def __post_init__(self):
        if (self.labels is None) == (self.router_of is None):
            raise ValueError(
                f"One of `labels` and `router_of` must be given, and only one, got labels={self.labels!r} and "
                f"router_of={self.router_of!r}."
            )
        if self.router_of is not None and self.eval_labels is not None:
            raise ValueError(
                f"`eval_labels` must be left out with `router_of`, where nothing is trained, got {self.eval_labels!r}."
            )
        check_choice("target", self.target, ROUTER_TARGETS)
        check_least(self, width=1, num_top=1, num_epochs=1, max_steps=1, head_batch_size=1, max_positions=1)
        check_least(self, batch_size=1, min_gain=0.0, seed=0)
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate!r}.")


def read_both(args: RouterArguments):
    """Labels to learn from, held-out ones of other problems, and the header.

    Raises:
        ValueError: where the two share problems, or no problem can be spared.
    """
    labels, header = read_labels(args.labels)
    if args.eval_labels is not None:
        held_out, _ = read_labels(args.eval_labels, split="all")
    elif "validation" in label_splits(args.labels):
        held_out, _ = read_labels(args.labels, split="validation")
    else:
        is_held_out = [share_of(id) < 0.2 for id in labels["problem_id"]]
        held_out = labels.select([i for i, held in enumerate(is_held_out) if held])
        labels = labels.select([i for i, held in enumerate(is_held_out) if not held])
    for name, rows in (("labels", labels), ("eval_labels", held_out)):
        if len(rows) == 0:
            raise ValueError(f"`{name}` hold no trajectory: label more problems, or pass `eval_labels`.")
    shared = set(labels["problem_id"]) & set(held_out["problem_id"])
    if shared:
        raise ValueError(
            f"`labels` and `eval_labels` share {len(shared)} problems ({sorted(shared)[:3]} ...): layer and epoch are "
            "to be chosen on problems that the router has not learned from."
        )
    return labels, held_out, header


def write_router(adapter: str, config: SelectorConfig, problem_ids: Iterable[str], save: Callable[[str], str]) -> str:
    """Puts a router beside an adapter, and takes away what was calibrated with another one.

    Args:
        adapter: folder of the adapter.
        config: config of the adapter, as it was.
        problem_ids: ids of the problems that the router has seen.
        save: writes the router into a folder and returns its fingerprint, as `Router.save_pretrained` does.

    Returns:
        The end of the sentence that tells the user what was taken away, and what to do next.
    """
    (Path(adapter) / CALIBRATION_NAME).unlink(missing_ok=True)
    write_seen_problems(adapter, "router", problem_ids)
    fingerprint = save(adapter)
    # what was calibrated with another router: all thresholds where it had a say in the decisions, else its own
    depends = config.fusion is not None and config.fusion.router != 0
    thresholds = {} if depends else {name: by for name, by in config.thresholds.items() if name != "router"}
    fusion = None if depends else config.fusion
    gone = ["the fusion weights"] if depends else []
    if names := [name for name in config.thresholds if name not in thresholds]:
        gone.insert(0, f"the thresholds of {', '.join(names)}")
    settings = {"thresholds": thresholds, "fusion": fusion, "decoding": still_calibrated(config.decoding, thresholds)}
    dataclasses.replace(config, router=fingerprint, **settings).save_pretrained(adapter)
    card = Path(adapter) / CARD_NAME
    if gone and card.is_file():
        with atomic_write(card) as out:
            out.write(without_calibration(card.read_text(encoding="utf-8")).encode())
    removed = f" Removed, because it was calibrated with the router before: {' and '.join(gone)}." if gone else ""
    return f".{removed} Calibrate next (s2t calibrate)."


def take_router(args: RouterArguments, config: SelectorConfig) -> None:
    """Writes the router of another adapter beside this one, as training it here would have done.

    Raises:
        ValueError: where there is none, or not known what it has seen, or training here would give another one.
    """
    if not Path(args.router_of).is_dir():
        raise ValueError(f"`router_of` must be the local folder of an adapter with a router, got {args.router_of!r}.")
    other = SelectorConfig.from_pretrained(args.router_of)
    if not other.router:
        raise ValueError(f"`router_of`: {args.router_of!r} has no router; take one that has, or pass `labels`.")
    file = Path(args.router_of) / ROUTER_WEIGHTS_NAME
    data = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(data).hexdigest()[:16] != other.router:
        raise ValueError(f"`router_of`: {file} is not the router that {S2T_CONFIG_NAME} names, {other.router}.")
    problem_ids = read_seen_problems(args.router_of).get("router")
    if problem_ids is None:
        raise ValueError(
            f"`router_of`: {args.router_of!r} does not tell which problems its router has seen: pass `labels`."
        )
    with safe_open(file, framework="pt") as weights:
        router = RouterConfig(**json.loads(weights.metadata()["router"]))
    pairs = {name: (getattr(other, name), getattr(config, name)) for name in SETTINGS}
    # an adapter that does not say what its model was takes the router of any
    if config.model_hash and not (router.model_hash and same_weights(router.model_hash, config.model_hash)):
        pairs = {"model_hash": tuple(map(weights_name, (router.model_hash, config.model_hash)))} | pairs
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"`router_of`: {args.router_of!r} has a router for {name}={theirs!r}, but {args.adapter!r} has "
                f"{name}={ours!r} and would get another one: pass `labels`."
            )

    def save(folder: str) -> str:
        with atomic_write(Path(folder) / ROUTER_WEIGHTS_NAME) as out:
            out.write(data)
        return other.router

    ending = write_router(args.adapter, config, problem_ids, save)
    print(
        f"taken from {args.router_of}: router {other.router} (target {router.target!r}, layer {router.layer}, "
        f"{len(problem_ids)} problems seen), written to {args.adapter}{ending}"
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = Parser(RouterArguments).parse_args_and_config(argv)
    config = open_adapter(args.adapter)
    if config.router and (Path(args.adapter) / ROUTER_WEIGHTS_NAME).is_file() and not args.overwrite:
        print(f"{args.adapter} already has a router; pass --overwrite true to write it anew.")
        return
    if config.proposals == "adapted":
        raise ValueError(
            f"{args.adapter} writes text with the adapter on (proposals='adapted'), but labels hold what the base "
            "model would write first: a router cannot be trained on them. Use trigger='entropy' or 'margin'."
        )
    if args.router_of is not None:
        take_router(args, config)
        return
    labels, held_out, header = read_both(args)
    check_same_tokenizer(args.labels, header, config)
    name = base_model_of(args.adapter, config, args.model)
    check_model("model", name)
    model = load_model(name, args.dtype, default_device())
    own_hash = check_trained_on(model, config)
    layers = args.layers or default_layers(model)
    wrong = [layer for layer in layers if not 1 <= layer <= num_layers(model)]
    if wrong:
        raise ValueError(f"`layers` must be in [1, {num_layers(model)}], the model's layers, got {wrong[0]}.")

    num_rows = model.get_output_embeddings().weight.shape[0]
    excluded = [id for id in config.reserved_token_ids if id < num_rows]
    settings = {name: getattr(args, name) for name in ("num_top", "batch_size", "max_positions", "seed")}
    settings |= {name: getattr(config, name) for name in ("min_prob_ratio", "warmup_tokens")}
    train, tuning = (collect(model, rows, layers, excluded_ids=excluded, **settings) for rows in (labels, held_out))
    head = {name: getattr(args, name) for name in ("num_top", "width", "target", "min_gain")}
    hidden_size = model.config.get_text_config().hidden_size
    router_config = RouterConfig(hidden_size=hidden_size, layer=max(layers), model_hash=own_hash, **head)
    settings = {name: getattr(args, name) for name in ("seed", "learning_rate", "num_epochs", "max_steps")}
    router, losses = fit_router(model, train, tuning, router_config, batch_size=args.head_batch_size, **settings)
    ending = write_router(
        args.adapter, config, [*labels["problem_id"], *held_out["problem_id"]], router.save_pretrained
    )

    print(f"\n{len(train.gain_N)} positions of {len(labels)} trajectories, {len(tuning.gain_N)} held out")
    print("held-out loss by layer: " + ", ".join(f"{layer}: {loss:.4f}" for layer, loss in losses.items()))
    print(f"layer {router.config.layer} is read\n")
    features = {"entropy": 0, "margin": 1}
    table = {name: trigger_metrics(tuning.features_NF[:, i], tuning, router.config) for name, i in features.items()}
    table["router"] = router.config.metrics
    table["kl (oracle)"] = trigger_metrics(tuning.divergence_N, tuning, router.config)
    columns = ("auc_differs", "auc_gain", "auc_differs_choice", "auc_gain_choice")
    print(f"{'held-out AUC':<14}" + "".join(f"{name:>20}" for name in columns))
    for name, metrics in table.items():
        print(f"{name:<14}" + "".join(f"{metrics.get(column, float('nan')):>20.3f}" for column in columns))
    print(
        "differs: the teacher's best candidate above the floor is not the first; gain: and gains more than "
        f"{args.min_gain:g} nats;\n_choice: among positions with two or more candidates above the floor"
    )
    print(f"\nwritten to {Path(args.adapter)}; {S2T_CONFIG_NAME} names it{ending}")
