"""Select to Think (arXiv 2604.26940) for Hugging Face Transformers.

Decoding needs torch, transformers and peft; the trainer is imported on first use and needs datasets too.
"""

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


def __getattr__(name: str):
    if name == "S2TConfig":
        from transformers_s2t.training.s2t_config import S2TConfig

        return S2TConfig
    if name == "S2TTrainer":
        from transformers_s2t.training.s2t_trainer import S2TTrainer

        return S2TTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
