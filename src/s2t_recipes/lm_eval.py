"""S2T in lm-evaluation-harness: the model `s2t`, which is `hf` with a selector.

    python -m s2t_recipes.lm_eval run --model s2t --tasks gsm8k --apply_chat_template \
        --model_args pretrained=Qwen/Qwen2.5-0.5B-Instruct,s2t_adapter=you/selector,trigger=router,target_rate=0.05

All of the harness's own options and model arguments are taken. Its command `lm-eval` knows only models of its own, so
this module registers one and then runs it. In Python, `import s2t_recipes.lm_eval` does the same for
`lm_eval.simple_evaluate(model="s2t", ...)`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from transformers_s2t import LocalSelector, S2TDecodingConfig, s2t_generate


class S2TLM(HFLM):
    """A causal language model that decodes with S2T-Local.

    Args:
        pretrained: name or path of the base model, or a checkpoint that was saved with `include_base`.
        s2t_adapter: folder or Hub repository of the selector; `None` where `pretrained` holds it.
        trigger, target_rate, threshold, num_candidates: as in [`S2TDecodingConfig`]; what is not given is what the
            selector was deployed with.
        s2t_revision: of `s2t_adapter` on the Hub.
        kwargs: as for `hf`, batch size, dtype and device among them.

    Raises:
        ValueError: as [`LocalSelector.from_pretrained`] and [`S2TDecodingConfig`].
    """

    def __init__(
        self,
        pretrained: str,
        s2t_adapter: str | None = None,
        trigger: str | None = None,
        target_rate: float | None = None,
        threshold: float | None = None,
        num_candidates: int | None = None,
        s2t_revision: str | None = None,
        **kwargs: Any,
    ):
        for name in ("peft", "delta"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` writes other text than the selector was made for: merge it into the model."
                )
        asked = {"target_rate": target_rate, "threshold": threshold, "num_candidates": num_candidates}
        asked = {name: value for name, value in asked.items() if value is not None}
        if trigger is None and asked.keys() & {"target_rate", "threshold"}:
            raise ValueError("`target_rate` and `threshold` need `trigger`, got none.")
        asked |= {"trigger": trigger} if trigger else {}
        config = S2TDecodingConfig(**asked) if asked else None
        super().__init__(pretrained, backend="causal", **kwargs)
        hub = {"revision": s2t_revision} if s2t_revision else {}
        source = s2t_adapter or pretrained
        self.selector = LocalSelector.from_pretrained(source, self.model, processing_class=self.tokenizer, **hub)
        self.decoding_config = self.selector.resolve_config(config)
        self.decoding_config.resolve_threshold(self.selector.thresholds)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        s2t = {"selector": self.selector, "decoding_config": self.decoding_config}
        return super()._model_generate(context, max_length, stop, custom_generate=s2t_generate, **s2t, **kwargs)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError(
            "S2T decides what is written; it gives texts no likelihood. Tasks of `loglikelihood` measure the base "
            "model: run them with `--model hf`."
        )

    loglikelihood_rolling = loglikelihood


if __name__ == "__main__":
    import s2t_recipes.lm_eval  # noqa: F401  (registers the model, once in a process)

    cli_evaluate()
else:
    register_model("s2t")(S2TLM)
