"""Select to Think (arXiv 2604.26940) for Hugging Face Transformers.

Decoding needs torch, transformers and peft; the trainer is imported on first use and needs datasets too.
"""

from typing import TYPE_CHECKING

from .config import FusionWeights, S2TDecodingConfig, SelectorConfig
from .generation import s2t_generate
from .logits_process import S2T, S2TLogitsProcessor
from .router import Router
from .selection import LocalSelector, S2TTrace, Selector, TeacherSelector


if TYPE_CHECKING:
    from .s2t_config import S2TConfig
    from .s2t_trainer import S2TTrainer

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


def __getattr__(name: str):
    if name == "S2TConfig":
        from .s2t_config import S2TConfig

        return S2TConfig
    if name == "S2TTrainer":
        from .s2t_trainer import S2TTrainer

        return S2TTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
