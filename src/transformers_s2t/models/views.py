"""Views of a model, through which several calls can run it at the same time.

A view is a second tree of modules over the same weights. Whether an adapter is on, and which outputs are watched, are
properties of the view. So a call changes nothing on the model itself: threads do not disturb each other, and after an
exception there is nothing to restore.

Legend: B rows, M tokens, D hidden size, N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# ---------------------------------------------------------------------------------------------------------------------
# Any model


def make_view(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    own: Collection[nn.Module] = (),
    watches: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
) -> nn.Module:
    """A copy of `model` in which some modules are replaced, and which shares every weight with it.

    Modules above a replaced one are copied without their weights; all others are the model's own. Hooks of a copied
    module keep working; hooks that are added to the copy do not reach the model.

    Args:
        model: left as it is.
        replacements: id(module) -> the module in its place.
        own: modules that are copied in any case.
        watches: id(module) -> function that is called with the module's output (the first one, where it has several)
            in every forward of the view.
    """
    watches = watches or {}
    copied = {id(module) for module in own} | set(watches)
    made: dict[int, nn.Module] = dict(replacements)

    def visit(module: nn.Module) -> nn.Module:
        if (done := made.get(id(module))) is not None:
            return done
        if not module._modules and id(module) not in copied:
            return module
        before = module._modules.copy()
        children = {name: child if child is None else visit(child) for name, child in before.items()}
        is_changed = any(child is not before[name] for name, child in children.items())
        made[id(module)] = copy_module(module, children) if is_changed or id(module) in copied else module
        if id(module) in watches:
            made[id(module)].register_forward_hook(functools.partial(tell, watches[id(module)]))
        return made[id(module)]

    view = visit(model)
    changed = {old: new for old, new in made.items() if id(new) != old and old not in replacements}
    for new in changed.values():
        for name, value in new.__dict__.items():
            if isinstance(value, (FunctionType, MethodType, functools.partial)):  # a `forward` of its own, say
                new.__dict__[name] = _rebind(value, made)
    return view


def tell(watch: Callable[[torch.Tensor], None], module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook: calls `watch` with a module's output, the first one where it has several."""
    watch(output if isinstance(output, torch.Tensor) else output[0])


def copy_module(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of the module with other children, the same tensors, and its own registers of hooks."""
    attributes = module.__dict__.copy()
    for name, value in attributes.items():
        if "hooks" in name and isinstance(value, dict):  # registers of hooks, by id
            hooks = [(id, hook) for id, hook in list(value.items()) if not getattr(hook, "skips_views", False)]
            attributes[name] = type(value)(hooks) if hooks else type(value)()
    attributes |= {"_modules": children, "_copy_of": module}
    attributes["_compiled_call_impl"] = None  # torch.compile's is bound to the module
    copied = object.__new__(type(module))
    copied.__dict__.update(attributes)
    return copied


def _rebind(value: Any, changed: Mapping[int, nn.Module], seen: tuple[FunctionType, ...] = ()) -> Any:
    """A function that is bound to modules, bound to their counterparts in a view instead.

    Accelerate, Liger, torch.compile and others give single modules a `forward` of their own: methods, partials and
    closures around the module.
    """
    if isinstance(value, nn.Module):
        return changed.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebind(value.__self__, changed, seen))
    if isinstance(value, functools.partial):
        keywords = {name: _rebind(argument, changed, seen) for name, argument in value.keywords.items()}
        bound = functools.partial(
            _rebind(value.func, changed, seen),
            *(_rebind(argument, changed, seen) for argument in value.args),
            **keywords,
        )
        bound.__dict__.update(value.__dict__)
        return bound
    if isinstance(value, FunctionType) and value not in seen:
        seen = (*seen, value)
        if (compiled := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
            return _rebind(compiled, changed, seen)
        if value.__closure__:
            return _rebind_closure(value, changed, seen)
    return value


def _rebind_closure(
    function: FunctionType, changed: Mapping[int, nn.Module], seen: tuple[FunctionType, ...]
) -> FunctionType:
    held = [_content(cell) for cell in function.__closure__]
    rebound = [_rebind(content, changed, seen) for content in held]
    if all(new is old or (isinstance(new, MethodType) and new == old) for new, old in zip(rebound, held)):
        return function
    cells = tuple(cell if new is old else CellType(new) for cell, new, old in zip(function.__closure__, rebound, held))
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def get_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends in hidden states, without the output head."""
    return getattr(model, model.base_model_prefix, None) or model.model  # Llama 4 gives a wrong prefix


def innermost_decoder(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head reads. (OPT's forward skips the outer of its two decoders.)"""
    decoder = model.get_decoder()
    # Llama 4 does not know where its decoder is, and ModernBERT calls its head the decoder
    return get_decoder(model) if decoder is model or decoder is model.get_output_embeddings() else decoder


# ---------------------------------------------------------------------------------------------------------------------
# A model that holds an adapter


_MODES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


class ModelViews:
    """Views of a model with one of its adapters off, on, or on for some tokens. Made anew for every call.

    Off is the model as its user has it: bare, or with those of the user's own adapters that are active at this moment.
    On adds the adapter to that. An adapter that is off does not run at all, whereas a layer that PEFT switches off
    costs a tenth of a step of a small model on a fast device.

    Args:
        model: causal language model. It is left as it is.
        adapter_name: `None` for a model without one.
        watches: as in [`make_view`].

    Raises:
        ValueError: where the adapter is merged into the weights, or a layer is in a state that PEFT itself would
            change in its next forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter_name: str | None = None,
        watches: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
    ):
        self.model, self.adapter_name, self._watches = model, adapter_name, watches or {}
        self._layers = adapted_layers(model, adapter_name)
        for layer in self._layers:
            _check_layer(layer, adapter_name)
        self._views: dict[str, PreTrainedModel] = {}
        self._tokens: slice = slice(None)
        self._shape: tuple[int, int] | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The view with the adapter off for every token."""
        if not self._layers and not self._watches:
            return self.model
        return self._view("base", self._off)

    @property
    def adapted(self) -> PreTrainedModel:
        """The view with the adapter on for every token."""
        return self._view("adapted", self._on)

    @property
    def can_split(self) -> bool:
        """Whether [`on_tokens`] is exact: plain LoRA on linear layers, which adds to each token separately."""
        return all(_is_plain_lora(layer, self.adapter_name) for layer in self._layers)

    def follow_modes(self) -> None:
        """For views that are kept: sets each module's training and checkpointing mode to what the model has now."""
        for view in (self.base, self.adapted):
            for module in view.modules():
                if (original := module.__dict__.get("_copy_of")) is not None:
                    modes = {name: value for name, value in original.__dict__.items() if name in _MODES}
                    module.__dict__.update(modes)

    def on_tokens(self, tokens: slice, shape: tuple[int, int] | None = None) -> PreTrainedModel:
        """The view with the adapter on for some tokens of each row, off for the others. One such forward at a time.

        Args:
            tokens: which tokens of each row see the adapter.
            shape: (rows, tokens) of the input. Needed for layers that flatten rows and tokens into one axis.

        Raises:
            TokensNotInRows: by the forward, where a layer with the adapter flattens its input (experts do).
        """
        self._tokens, self._shape = tokens, shape
        return self._view("on_tokens", lambda layer: _OnTokens(self._off(layer), layer, self))

    def _view(self, name: str, form: Callable[[nn.Module], nn.Module]) -> PreTrainedModel:
        """The view of this name, made on first use; `form` gives the replacement of each layer with the adapter.

        (No `functools.cached_property`: before Python 3.12 all objects of a class share its lock.)
        """
        if name not in self._views:
            # copied, so that a hook that reads a decoder's output can be put on the view alone
            own = [self.model, get_decoder(self.model), innermost_decoder(self.model)]
            replacements = {id(layer): form(layer) for layer in self._layers}
            self._views[name] = make_view(self.model, replacements, own, self._watches)
        return self._views[name]

    def _off(self, layer: nn.Module) -> nn.Module:
        disabled, active = _others(layer, self.adapter_name)
        below = self._below(layer, self._off)
        return below if disabled or not active else _with_active(layer, below, active)

    def _on(self, layer: nn.Module) -> nn.Module:
        disabled, active = _others(layer, self.adapter_name)
        active = [self.adapter_name] if disabled else [*active, self.adapter_name]
        return _with_active(layer, self._below(layer, self._on), active)

    def _below(self, layer: nn.Module, form: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The layer inside a layer, itself replaced: LoRA on two parameters of one module is a layer in a layer."""
        below = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer.base_layer
        return form(below) if below in self._layers else below


class _OnTokens(nn.Module):
    """A layer whose adapter is on for some tokens of each row: those of the last [`ModelViews.on_tokens`]."""

    def __init__(self, off: nn.Module, layer: LoraLayer, views: ModelViews):
        super().__init__()
        name = views.adapter_name
        self.off, self._views = off, views
        self.lora_A, self.lora_B = layer.lora_A[name], layer.lora_B[name]
        self.dropout, self.scaling, self._cast = layer.lora_dropout[name], layer.scaling[name], layer._cast_input_dtype
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models ask a layer for its weight
            return getattr(super().__getattr__("off"), name)

    def forward(self, input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.off(input, *args, **kwargs)
        in_rows, out_rows, shape = input, output, self._views._shape
        if input.dim() == 2 and shape is not None and len(input) == shape[0] * shape[1]:
            in_rows, out_rows = input.unflatten(0, shape), output.unflatten(0, shape)
        if in_rows.dim() != 3:
            raise TokensNotInRows
        tokens = self._views._tokens
        chosen_BMD = self.dropout(self._cast(in_rows[:, tokens], self.lora_A.weight.dtype))
        out_rows[:, tokens] += self.lora_B(self.lora_A(chosen_BMD)) * self.scaling
        return output


class TokensNotInRows(Exception):
    """A layer's input is not (rows, tokens, features), so that its tokens cannot be identified."""


def adapted_layers(model: nn.Module, adapter_name: str | None) -> list[nn.Module]:
    """The layers that hold an adapter, without the head: scores read its trained rows directly, and text never needs
    them."""
    if adapter_name is None:
        return []
    found = [module for module in model.modules() if _holds_adapter(module, adapter_name)]
    wrappers = [layer for layer in found if isinstance(layer, TrainableTokensWrapper)]
    head = {inner for wrapper in wrappers for inner in wrapper.modules()}
    return [layer for layer in found if layer not in head]


def adapter_state(model: nn.Module) -> dict[nn.Module, tuple[bool, list[str]]]:
    """Which adapters are active in each layer of a model: layer -> (disabled, names)."""
    layers = (module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return {layer: (layer._disable_adapters, _names(layer._active_adapter)) for layer in layers}


def switch_adapter(
    model: nn.Module,
    adapter_name: str,
    enabled: bool,
    state: Mapping[nn.Module, tuple[bool, list[str]]] | None = None,
) -> None:
    """Sets whether the model itself, outside of S2T, has an adapter on. Its other adapters stay as they are.

    PEFT's own calls walk every parameter and change `requires_grad`, which a trainer must keep.

    Args:
        model: holds the adapter.
        adapter_name: name of the adapter.
        enabled: on or off, for text. The rows of the head, which only scores read, are off in any case.
        state: what [`adapter_state`] returned before the adapter was loaded; loading may switch off others.
    """
    before = adapter_state(model)
    text_layers, after = set(adapted_layers(model, adapter_name)), {}
    for layer in (layer for layer in before if _holds_adapter(layer, adapter_name)):
        disabled, active = (state or {}).get(layer, before[layer])
        active = [name for name in active if name != adapter_name and name not in layer.merged_adapters]
        if enabled and layer in text_layers:
            disabled, active = False, [adapter_name] if disabled else [*active, adapter_name]
        elif not active and getattr(model, "_hf_peft_config_loaded", False):
            disabled, active = True, [adapter_name]  # transformers saves the one that is active
        after[layer] = (disabled, active)
    try:
        _apply(after)
    except BaseException:  # Ctrl-C too: all layers are switched, or none
        _apply({layer: before[layer] for layer in after})
        raise


def _apply(states: Mapping[nn.Module, tuple[bool, list[str]]]) -> None:
    for layer, (disabled, active) in states.items():
        layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_is_on(model: nn.Module, adapter_name: str) -> bool:
    """Whether some layer of the model itself has an adapter on."""
    return any(
        adapter_name in _names(layer._active_adapter) and not layer._disable_adapters
        for layer in adapted_layers(model, adapter_name)
    )


def merge_adapter(model: nn.Module, adapter_name: str) -> None:
    """Adds an adapter to the base weights for good and takes its layers out of the model.

    Raises:
        ValueError: where that would not be exact: quantized weights, an adapter that is not plain LoRA, or other
            adapters beside it.
    """
    layers = adapted_layers(model, adapter_name)
    for layer in layers:
        others = {*layer.lora_A} - {adapter_name} if isinstance(layer, LoraLayer) else {"?"}
        # PEFT has a class for each quantization
        if others or not _is_plain_lora(layer, adapter_name) or type(layer) is not LoraLinear:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be merged exactly: that takes plain LoRA without another "
                f"adapter beside it, on weights that are not quantized, got {type(layer).__name__}."
            )
    places = [(parent, name, child) for parent, name, child in _places(model) if child in set(layers)]
    for parent, name, layer in places:
        layer.merge(safe_merge=True, adapter_names=[adapter_name])
        parent._modules[name] = layer.base_layer


def take_out_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter, and layers that hold no other one, out of a model, whose own weights stay as they are.

    Raises:
        ValueError: where it is merged into the weights.
    """
    places = [place for place in _places(model) if _holds_adapter(place[2], adapter_name)]
    for _, _, layer in places:
        if isinstance(layer, BaseTunerLayer) and adapter_name in layer.merged_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged into the model's weights: `unmerge_adapter()` first."
            )
    for parent, name, layer in places:
        if adapters_in(layer) == {adapter_name}:
            parent._modules[name] = _without(layer, adapter_name)
            continue
        for part in _parts(layer):
            if adapter_name in part:
                del part[adapter_name]
        layer._active_adapter = [active for active in _names(layer._active_adapter) if active != adapter_name]


def plain_view(model: PreTrainedModel, adapter_name: str) -> PreTrainedModel:
    """A view of a model as it was before an adapter came, with the names that its weights had.

    Raises:
        ValueError: where the adapter writes the text or is merged, or other adapters lie in the same model.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    held = set().union(*map(adapters_in, layers))
    if held - {adapter_name}:
        raise ValueError(
            f"The model holds the adapters {sorted(held)}, and with them its weights have other names: save them "
            "through their PeftModel, or merge them first (`merge_and_unload`)."
        )
    if adapter_is_on(model, adapter_name) or any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"The adapter {adapter_name!r} writes this model's text, which a checkpoint of the base model would not "
            "do: merge it first (`LocalSelector.merge()`), or use `s2t export`."
        )
    return make_view(model, {id(layer): _without(layer, adapter_name) for layer in layers}, own=[model])


def adapters_in(layer: nn.Module) -> set[str]:
    """Names of the adapters in a layer of PEFT."""
    return {name for part in _parts(layer) for name in part}


def _parts(layer: nn.Module) -> list[Any]:
    """What a layer of PEFT has for each adapter: mappings from their names."""
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    return [functools.reduce(lambda held, part: getattr(held, part, {}), name.split("."), layer) for name in names]


def _without(layer: nn.Module, adapter_name: str) -> nn.Module:
    """The model's own module in a layer of PEFT, or in a layer in such a layer."""
    while _holds_adapter(layer, adapter_name):
        layer = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer.base_layer
    return layer


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module of a model as (parent, name in it, module)."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _holds_adapter(layer: nn.Module, adapter_name: str) -> bool:
    if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return False
    return adapter_name in adapters_in(layer)


def _names(active: str | list[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def _others(layer: nn.Module, adapter_name: str) -> tuple[bool, list[str]]:
    """A layer's state apart from one adapter: (disabled, names of active adapters that are not merged)."""
    there = set(_names(layer._active_adapter)) - {adapter_name, *layer.merged_adapters}
    return layer._disable_adapters, [name for name in _names(layer._active_adapter) if name in there]


def _with_active(layer: nn.Module, below: nn.Module, active: list[str]) -> nn.Module:
    """The layer with these adapters on, on top of what is merged into the weights `below`."""
    copied = copy_module(layer, dict(layer._modules))
    copied.__dict__ |= {"_disable_adapters": False, "_active_adapter": active, "merged_adapters": []}
    if isinstance(layer, ParamWrapper) and not isinstance(below, ParamWrapper):
        # PEFT exchanges the parameter of the module below for the time of a forward
        below = copy_module(below, dict(below._modules))
        below.__dict__["_parameters"] = dict(below._parameters)
    if "base_layer" in copied._modules:
        copied._modules["base_layer"] = below
    return copied


def _check_layer(layer: nn.Module, adapter_name: str) -> None:
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"The S2T adapter {adapter_name!r} is merged into the model's weights: without it there is no text of the "
            "base model and no score. Call `unmerge_adapter()` first (LocalSelector.merge is for proposals='adapted')."
        )
    if layer._disable_adapters and layer.merged_adapters:
        raise ValueError(
            f"The adapters {layer.merged_adapters} are merged into the model's weights and switched off at the same "
            "time; PEFT takes them out in its next forward. Call `unmerge_adapter()`, or switch adapters on again."
        )
    for hook in layer._forward_pre_hooks.values():
        if {"adapter_names", "alora_offsets"} & set(getattr(hook, "keywords", {})):
            raise ValueError(
                "S2T runs rows in batches of its own: `adapter_names` and `alora_offsets`, which choose adapters by "
                "row and token, are not supported. Use `set_adapter`."
            )


def _is_plain_lora(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter adds B A x times a number to this layer's output, for each token separately."""
    return (
        isinstance(layer, LoraLayer)
        and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))
        and adapter_name in layer.lora_A
        and adapter_name not in layer.lora_variant
    )
