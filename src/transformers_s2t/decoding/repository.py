"""`generate` of a selector's repository: `model.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)`.

transformers runs `custom_generate/generate.py` of the repository, which is this function. The selector is loaded into
the model in the first call and kept as long as the model is.
"""

from __future__ import annotations

import functools
import threading
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from transformers_s2t.config import S2TDecodingConfig
from transformers_s2t.decoding.call import running_calls
from transformers_s2t.decoding.generation import s2t_generate
from transformers_s2t.decoding.local_selector import LocalSelector
from transformers_s2t.decoding.session import S2TTrace


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder")
_selectors: WeakKeyDictionary[PreTrainedModel, dict[tuple, LocalSelector]] = WeakKeyDictionary()
_loading = threading.Lock()


def generate(
    *args: Any,
    model: PreTrainedModel,
    decoding_config: S2TDecodingConfig | dict[str, Any] | str | None = None,
    trace: S2TTrace | None = None,
    **kwargs: Any,
) -> Any:
    """Decodes with the selector of the repository that this call of `generate` names, or that `model` came from.

    Args:
        args, kwargs: as for `model.generate`, streamers, sampling and `return_dict_in_generate` among them.
        model: the base model of the selector.
        decoding_config: how to select; `None` for what is stored with the selector.
        trace: filled with what happens in this call.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: where nothing names the repository, or as [`LocalSelector.from_pretrained`] and [`s2t_generate`].
    """
    named = [call.custom_generate for call in running_calls() if isinstance(call.custom_generate, str)]
    repository = named[0] if named else model.config._name_or_path
    if not repository:
        raise ValueError("`custom_generate` must name the repository of a selector: this model does not know its own.")
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    selector = _selector(model, repository, hub)
    return type(model).generate(
        model,
        *args,
        custom_generate=s2t_generate,
        selector=selector,
        decoding_config=decoding_config,
        trace=trace,
        **kwargs,
    )


def _guard_continuous_batching() -> None:
    """Makes continuous batching refuse a checkpoint that decodes with S2T by itself.

    It never calls `generate`, so it would return the base model's text without a word.
    """
    owner = next(kind for kind in GenerationMixin.__mro__ if "init_continuous_batching" in vars(kind))
    init_continuous_batching = owner.init_continuous_batching

    @functools.wraps(init_continuous_batching)
    def guarded(self, *args, **kwargs):
        own = vars(self).get("generate")
        if isinstance(own, functools.partial) and own.func is generate:
            raise ValueError(
                "This checkpoint decodes with S2T, which continuous batching would leave out: serve it without "
                "`--continuous-batching`, or load it without `trust_remote_code` for the base model's text."
            )
        return init_continuous_batching(self, *args, **kwargs)

    owner.init_continuous_batching = guarded


_guard_continuous_batching()


def _selector(model: PreTrainedModel, repository: str, hub: dict[str, Any]) -> LocalSelector:
    """The selector of a repository in this model, loaded once."""
    key = (repository, *sorted((name, str(value)) for name, value in hub.items()))
    with _loading:
        held = _selectors.setdefault(model, {})
        if key not in held:
            name = "s2t" if not held else f"s2t_{len(held)}"
            held[key] = LocalSelector.from_pretrained(repository, model, adapter_name=name, **hub)
        return held[key]
