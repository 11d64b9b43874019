"""Select to Think (arXiv 2604.26940) for Hugging Face Transformers.

Decoding needs torch, transformers and peft; the trainer is imported on first use and needs datasets too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers_s2t.config import FusionWeights, S2TDecodingConfig, SelectorConfig
from transformers_s2t.decoding.generation import s2t_generate
from transformers_s2t.decoding.local_selector import LocalSelector
from transformers_s2t.decoding.logits_process import S2T, S2TLogitsProcessor
from transformers_s2t.decoding.selectors import Selector, TeacherSelector
from transformers_s2t.decoding.session import S2TTrace
from transformers_s2t.router import Router


if TYPE_CHECKING:
    from transformers_s2t.training.s2t_config import S2TConfig
    from transformers_s2t.training.s2t_trainer import S2TTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "FusionWeights",
    "LocalSelector",
    "Router",
    "S2T",
    "S2TConfig",
    "S2TDecodingConfig",
    "S2TLogitsProcessor",
    "S2TTrace",
    "S2TTrainer",
    "Selector",
    "SelectorConfig",
    "TeacherSelector",
    "s2t_generate",
]


#: Imported on first use: they need more than decoding does.
_LAZY = {
    "S2TConfig": "transformers_s2t.training.s2t_config",
    "S2TTrainer": "transformers_s2t.training.s2t_trainer",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == __name__:
            raise
        raise ImportError(
            f"`{name}` needs the package {error.name!r}, which is not installed: pip install 'transformers-s2t[train]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
