"""The router: a light head on the small model that says where its first choice is worth a second thought.

It reads what a decoding step has anyway, one hidden state and the step's logits, so it needs no teacher. This file
knows how it reads and how it is stored; `router_training` knows how it learns.

Legend: B rows, T tokens, D hidden size, F proposal features, V vocabulary.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from transformers_s2t import triggers
from transformers_s2t.config import ROUTER_WEIGHTS_NAME, check_choice, check_range
from transformers_s2t.files import atomic_write
from transformers_s2t.fingerprints import model_hash, same_weights, weights_name
from transformers_s2t.models.views import innermost_decoder, tell
from transformers_s2t.selector_files import find_file


ROUTER_TARGETS = ("gain", "differs", "kl")
_LEAST_LOGPROB = -20.0  # floor of a feature: tokens that a user's processor forbids are at -inf


@dataclass(frozen=True)
class RouterConfig:
    """What a router reads and what it was trained to predict; stored in the metadata of its weights.

    Args:
        hidden_size (`int`): D of the small model.
        layer (`int`): the layer whose output is read, 1 to the number of layers; the last one is read after the final
            norm.
        num_top (`int`): number of best log-probabilities that are read.
        width (`int`): size of the head's hidden layer.
        target (`str`): what it predicts. "gain": the teacher's best candidate above the floor gains more than
            `min_gain` over the first one; "differs": it is not the first one; "kl": the logarithm of
            KL(teacher || student).
        min_gain (`float`): least gain of the target "gain", nats.
        model_hash (`str`): fingerprint of the small model's weights.
        metrics (`dict`): held-out figures.
    """

    hidden_size: int
    layer: int
    num_top: int = 8
    width: int = 64
    target: str = "gain"
    min_gain: float = 0.5
    model_hash: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("hidden_size", "layer", "num_top", "width"):
            check_range(name, getattr(self, name), 1, 1 << 20, integer=True)
        check_choice("target", self.target, ROUTER_TARGETS)
        check_range("min_gain", self.min_gain, 0.0, 1e4)

    @property
    def num_features(self) -> int:
        """F: entropy, margin, and the best log-probabilities."""
        return 2 + self.num_top


def proposal_features(logits_BV: torch.Tensor, num_top: int) -> torch.Tensor:
    """What the router reads of a step's logits, float32 (B, 2 + num_top): entropy, margin, best log-probabilities.

    Args:
        logits_BV: as the triggers see them: after the user's processors, with reserved tokens at -inf.
        num_top: number of log-probabilities, nats, best first; -20 where the vocabulary has fewer tokens. Like the
            entropy they are renormalised over the 64 best tokens: a sum over a large vocabulary would take longer
            than everything else.
    """
    top_BK = torch.topk(logits_BV.float(), min(max(64, num_top), logits_BV.shape[-1]), dim=-1).values
    logprobs_BK = torch.log_softmax(top_BK, dim=-1)[..., :num_top]
    logprobs_BK = nn.functional.pad(logprobs_BK, (0, num_top - logprobs_BK.shape[-1]), value=_LEAST_LOGPROB)
    own_B2 = torch.stack([triggers.entropy(top_BK), triggers.margin(top_BK)], dim=-1)
    return torch.cat([own_B2, logprobs_BK], dim=-1).clamp_min(_LEAST_LOGPROB)


class RouterHead(nn.Module):
    """Two layers on a standardised hidden state and proposal features, always in float32."""

    def __init__(self, config: RouterConfig):
        super().__init__()
        size = config.hidden_size + config.num_features
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.hidden = nn.Linear(size, config.width)
        self.out = nn.Linear(config.width, 1)

    def forward(self, hidden_BD: torch.Tensor, features_BF: torch.Tensor) -> torch.Tensor:
        """Logits (B,), bigger = more in doubt."""
        inputs_BX = torch.cat([hidden_BD.float(), features_BF.float()], dim=-1)
        inputs_BX = (inputs_BX - self.mean) / self.scale
        return self.out(nn.functional.gelu(self.hidden(inputs_BX)))[..., 0]


class LastHidden:
    """The output of one layer in a call's last forward."""

    def __init__(self):
        self.clear()

    def see(self, hidden_BTD: torch.Tensor) -> None:
        self.num_forwards += 1
        self._last_BTD = hidden_BTD.detach()

    def clear(self) -> None:
        self.num_forwards, self._last_BTD = 0, None

    def take(self) -> torch.Tensor | None:
        """Hidden states (B, T, D) of the last forward since the previous `take`, `None` without one. Forgets them."""
        last_BTD = self._last_BTD
        self.clear()
        return last_BTD


class _Local(threading.local):
    """A [`LastHidden`] for each thread."""

    def __init__(self):
        self.hidden = LastHidden()


class HiddenTap:
    """While open, keeps a module's last output, separately for each thread that runs it.

    It serves forwards that S2T does not run itself; S2T's own run views of the model, which have watches of their own
    (`models.views.make_view`). Copies of the module are not watched, and a copy of the tap is closed.

    Args:
        module: the module to watch, from [`read_module`].
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._handle: RemovableHandle | None = None
        self._local = _Local()

    def __reduce__(self) -> tuple:
        return HiddenTap, (self._module,)

    def open(self) -> None:
        self._handle = self._module.register_forward_hook(_Hook(self))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._local = _Local()

    def __enter__(self) -> HiddenTap:
        self.open()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def hidden(self) -> LastHidden:
        """The last output that this thread computed."""
        return self._local.hidden


class _Hook:
    """A forward hook that feeds a tap. Copies and pickles of the model hold a [`_NoHook`] in its place."""

    skips_views = True

    def __init__(self, tap: HiddenTap):
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        tell(self.tap.hidden.see, module, args, output)

    def __reduce__(self) -> tuple:
        return _NoHook, ()


class _NoHook:
    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        """Does nothing: nobody watches."""


def num_layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def _find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's list of layers, found by its length, because models name it differently.

    Raises:
        ValueError: where it is not found.
    """
    depth = num_layers(model)
    for module in innermost_decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"The layers of {type(model).__name__} are not found: only its last one ({depth}) can be read, pass "
        f"`layer={depth}`."
    )


def read_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module whose output a router reads.

    Args:
        model: causal language model.
        layer: 1 to the number of layers; the last one is read after the final norm.

    Raises:
        ValueError: for a layer that the model does not have, or that is not found.
    """
    depth = num_layers(model)
    check_range("layer", layer, 1, depth, integer=True)
    return innermost_decoder(model) if layer == depth else _find_layers(model)[layer - 1]


class Router:
    """A trained head, and the model that it reads.

    Attributes:
        read: the module of the model whose output it reads.

    Args:
        model: the small model, the one that generates.
        head: the trained head.
        config: what it reads.

    Raises:
        ValueError: where the model has another hidden size or fewer layers.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, head: RouterHead, config: RouterConfig):
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden_size = self.model.config.get_text_config().hidden_size
        if config.hidden_size != hidden_size or config.layer > num_layers(self.model):
            raise ValueError(
                f"The router was trained on a model with hidden_size={config.hidden_size} and {config.layer} or more "
                f"layers, but `model` has hidden_size={hidden_size} and {num_layers(self.model)}: load the one it "
                "was trained on."
            )
        self.head, self.config = head.eval().requires_grad_(False), config
        self.read = read_module(self.model, config.layer)

    @torch.no_grad()
    def logits(self, hidden_BD: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """The head's logits (B,), on the device of `logits_BV`.

        Args:
            hidden_BD: hidden states of the last token at the router's layer.
            logits_BV: logits of the same forward, after the user's processors, reserved tokens at -inf.
        """
        if self.head.mean.device != hidden_BD.device:
            self.head.to(hidden_BD.device)
        features_BF = proposal_features(logits_BV, self.config.num_top)
        return self.head(hidden_BD, features_BF.to(hidden_BD.device)).to(logits_BV.device)

    def save_pretrained(self, folder: str | os.PathLike) -> str:
        """Writes `s2t_router.safetensors` into `folder` (atomically) and returns its fingerprint."""
        state = {name: tensor.contiguous().cpu() for name, tensor in self.head.state_dict().items()}
        data = save(state, metadata={"router": json.dumps(asdict(self.config), sort_keys=True)})
        with atomic_write(Path(folder) / ROUTER_WEIGHTS_NAME) as out:
            out.write(data)
        return _fingerprint(data)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PeftModel,
        *,
        expected: str | None = None,
        allow_other_model: bool = False,
        **hub_kwargs,
    ) -> Router:
        """Loads a router for `model`.

        Args:
            path: folder or Hub repository of the adapter that the router is stored beside.
            model: the base model that it was trained on.
            expected: fingerprint that the file must have.
            allow_other_model: skip the comparison of the model's weights with those that it was trained on.
            hub_kwargs: `revision`, `token`, `cache_dir` ... as in `from_pretrained` of transformers.

        Raises:
            FileNotFoundError: where there is no router.
            ValueError: where the file is not the expected one, not a router, or was trained on another model.
        """
        file = find_file(path, ROUTER_WEIGHTS_NAME, **hub_kwargs)
        if file is None:
            raise FileNotFoundError(f"{str(path)!r} holds no {ROUTER_WEIGHTS_NAME}: `s2t route` makes one.")
        found = _fingerprint(Path(file).read_bytes())
        if expected is not None and found != expected:
            raise ValueError(
                f"{file} is not the router that the adapter was calibrated with ({found}, not {expected}): train it "
                "again with `s2t route`, then calibrate."
            )
        try:
            config, head = _read(file)
        except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file} is no router of this version: {error}") from error
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if config.model_hash and not allow_other_model:
            weights = model_hash(base)
            if not same_weights(config.model_hash, weights):
                raise ValueError(
                    f"The router in {str(path)!r} was trained on weights {weights_name(config.model_hash)}, but "
                    f"`model` has {weights_name(weights)}: load the one it was trained on, or pass "
                    "`allow_other_model=True`."
                )
        return cls(model, head, config)


def _read(file: str) -> tuple[RouterConfig, RouterHead]:
    with safe_open(file, framework="pt") as weights:
        data = json.loads((weights.metadata() or {}).get("router", "{}"))
        state = {name: weights.get_tensor(name) for name in weights.keys()}
    unknown = set(data) - {f.name for f in fields(RouterConfig)}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    config = RouterConfig(**data)
    head = RouterHead(config)
    head.load_state_dict(state)
    return config, head


def _fingerprint(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]
