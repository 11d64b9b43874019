"""Checks of adapters, all before a model is loaded, and merging one into its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from transformers_s2t import S2TDecodingConfig, SelectorConfig
from transformers_s2t.config import S2T_CONFIG_NAME
from transformers_s2t.fingerprints import model_hash, same_weights, weights_name
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.models.peft_warnings import without_peft_warnings


#: File beside an adapter in which `s2t imitate` describes the finished training.
BASELINE_NAME = "baseline.json"


def open_adapter(adapter: str) -> SelectorConfig:
    """The config of an adapter, into whose folder the recipe writes.

    Raises:
        ValueError, FileNotFoundError: where it is no local folder, or that holds no adapter.
    """
    if not Path(adapter).is_dir():
        raise ValueError(
            f"`adapter` must be a local folder, because the recipe writes into it, got {adapter!r}; download an "
            "adapter of the Hub first (hf download)."
        )
    return SelectorConfig.from_pretrained(adapter)


def still_calibrated(
    policy: S2TDecodingConfig | None, thresholds: dict[str, dict[float, float]]
) -> S2TDecodingConfig | None:
    """The stored policy; `None`, and a printed line says so, where these thresholds have none for it."""
    if policy is not None:
        try:
            policy.resolve_threshold(thresholds)
        except ValueError:
            print(f"The stored policy, {policy.trigger} at {policy.target_rate}, has no threshold any more: removed.")
            return None
    return policy


def base_model_of(adapter: str, config: SelectorConfig, model: str | None) -> str:
    """The base model of an adapter: `model` where that is given, else the one that the adapter names.

    Raises:
        ValueError, FileNotFoundError: where the adapter names none, or one that is neither here nor on the Hub.
    """
    name = model or config.base_model
    if not name:
        raise ValueError(f"{adapter!r} does not say on which model it was trained: say where that is (--model).")
    if model is None and not Path(name).is_dir() and find_file(name, "config.json") is None:
        raise FileNotFoundError(
            f"{adapter!r} was trained on {name!r}, which is neither a folder with a model here nor found on the Hub: "
            "say where that model is (--model)."
        )
    return name


def check_same_tokenizer(
    labels: str, header: TrajectoryHeader | None, config: SelectorConfig, argument: str = "labels"
) -> None:
    """Raises a ValueError where labels were made with another tokenizer than the adapter's, naming the `argument`."""
    if header is not None and config.vocab_hash and header.vocab_hash != config.vocab_hash:
        raise ValueError(
            f"`{argument}` {labels!r} were made with another tokenizer ({header.vocab_hash}) than the adapter's "
            f"({config.vocab_hash}): label with {config.base_model!r}."
        )


def find_file(source: str, name: str) -> str | None:
    """Path of a file in a local folder or a Hub repository; `None` where it is not there, or the Hub is not."""
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    try:
        return cached_file(source, name, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    except OSError:  # no such folder or repository: whoever loads it says so
        return None


def check_tuned(argument: str, source: str, instead: str) -> None:
    """Raises a ValueError where `source` is no adapter that writes text.

    Args:
        argument, source: argument that the error names, and its value: a local folder or a Hub repository.
        instead: what to do with a selector, whose adapter scores candidates.
    """
    if find_file(source, S2T_CONFIG_NAME) is not None:
        raise ValueError(
            f"`{argument}` must be an adapter that writes text, got {source!r}, an S2T-Local selector "
            f"({S2T_CONFIG_NAME}), whose adapter scores candidates: {instead}."
        )
    try:
        PeftConfig.from_pretrained(source)
    except ValueError:
        raise ValueError(f"`{argument}`: {source!r} holds no adapter (s2t imitate).") from None


def check_model(argument: str, name: str, may_be_tuned: bool = False) -> None:
    """Raises a ValueError where a model is an adapter, which `from_pretrained` would switch on for all of the text.

    Args:
        argument, name: argument that the error names, and its value: a local folder or a Hub repository.
        may_be_tuned: whether an ordinary adapter is legal, and stands for its model, tuned.
    """
    if find_file(name, S2T_CONFIG_NAME) is not None:
        raise ValueError(
            f"`{argument}` must be a model, got {name!r}, an S2T-Local selector ({S2T_CONFIG_NAME}), whose adapter "
            "would write the text: pass the model that it was trained on."
        )
    if not may_be_tuned and find_file(name, CONFIG_NAME) is not None:
        raise ValueError(
            f"`{argument}` must be a model, got the adapter {name!r}: merge it into its model first "
            "(s2t merge), or pass that."
        )


def check_trained_on(model: PreTrainedModel, config: SelectorConfig) -> str:
    """The fingerprint of a model. Raises a ValueError where the selector was trained on other weights."""
    own = model_hash(model)
    if not same_weights(config.model_hash, own):
        raise ValueError(
            f"`model` has weights {weights_name(own)}, but the adapter was trained on "
            f"{weights_name(config.model_hash)} ({config.base_model!r}): load the one it was trained on."
        )
    return own


def merge_adapter(model: PreTrainedModel, source: str, argument: str = "adapter") -> PreTrainedModel:
    """The model with an adapter merged into it; the model that is passed in is used up.

    Embeddings and head get as many rows as the adapter was trained with, where it stores these rows or weights of
    their length.

    Raises:
        ValueError: where it was trained on a model of other shapes.
    """
    rows = set(_trained_rows(model, source))
    if len(rows) == 1 and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(*rows, mean_resizing=False)
    try:
        with without_peft_warnings():
            return PeftModel.from_pretrained(model, source).merge_and_unload()
    except RuntimeError as error:
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if mismatch is None:
            raise
        raise ValueError(
            f"`{argument}`: {source!r} was trained on a model of other shapes than `model`: {mismatch}"
        ) from None


def _trained_rows(model: PreTrainedModel, source: str) -> Iterator[int]:
    """Number of rows of embeddings and head in the training, read from the adapter's weights."""
    file = find_file(source, SAFETENSORS_WEIGHTS_NAME)
    if file is None:
        return
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():
            part = next((key.partition(f".{name}.")[2] for name in names if f".{name}." in key), "")
            if part in ("weight", "base_layer.weight", "lora_B.weight"):
                yield weights.get_slice(key).get_shape()[0]
            elif part == "lora_embedding_A":
                yield weights.get_slice(key).get_shape()[1]
