"""The card (`README.md`) of a selector: metadata for the Hub, how to load it, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from huggingface_hub import EvalResult, ModelCardData

from transformers_s2t.config import SelectorConfig
from transformers_s2t.files import HUB_ID


CARD_NAME = "README.md"
#: The last section of a card, which calibration writes.
CALIBRATION_TITLE = "## Calibration"
TAGS = ("transformers-s2t", "s2t", "lora", "arxiv:2604.26940")
PACKAGES = ("transformers-s2t", "transformers", "peft", "torch")
CITATION = """@inproceedings{s2t2026,
  title = {Select to Think},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  note = {arXiv:2604.26940}
}"""


def selector_card(
    config: SelectorConfig,
    repository: str,
    *,
    model_name: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] = (),
    calibration: str | None = None,
    include_base: bool = False,
) -> str:
    """The card of a selector, in Markdown.

    Args:
        config: the selector's.
        repository: Hub id or folder that it is loaded from.
        model_name: title, by default the last part of `repository`.
        license, language: metadata for the Hub.
        tags: beside those that every selector has.
        datasets: Hub ids of what it was trained on.
        calibration: text of the section that calibration writes.
        include_base: whether the base model is in the same repository.
    """
    name = model_name or repository.split("/")[-1]
    base, teacher = config.base_model or "the base model", config.teacher_model or "a larger model"
    measured = {key: value for key, value in config.metrics.items() if not key.endswith("loss")}
    source = {"task_type": "text-generation", "dataset_type": "s2t-labels", "dataset_name": "held-out decision points"}
    results = [EvalResult(**source, metric_type=key, metric_value=value) for key, value in measured.items()]
    data = ModelCardData(
        license=license,
        language=_as_list(language) or None,
        library_name="transformers-s2t",
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if is_hub_id(base) and not include_base else None,
        datasets=[one for one in _as_list(datasets) if is_hub_id(one)] or None,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *_as_list(tags)])),
        model_name=name if results else None,
        eval_results=results or None,
    )
    rows = "\n".join(f"| {key} | {value:.3f} |" for key, value in config.metrics.items())
    figures = (
        "Agreement with the teacher's best candidate at held-out decision points (Agree@1), and the controls:\n\n"
        f"| figure | value |\n|---|---|\n{rows}"
        if rows
        else "No held-out figures were measured (pass `eval_dataset`)."
    )
    writes = "base model" if config.proposals == "base" else "adapted model"
    text = f"""---
{data.to_yaml()}
---

# {name}

An S2T-Local selector for `{os.path.basename(base)}`: at uncertain tokens the model chooses among its own proposals
the one that {os.path.basename(teacher)} would choose, without that model at inference
([Select to Think](https://arxiv.org/abs/2604.26940)). The text itself is written by the {writes}.

```python
from transformers_s2t import S2T, LocalSelector, s2t_generate

selector = LocalSelector.from_pretrained("{repository}", model)
model.generate(**inputs, logits_processor=S2T(selector))
model.generate(**inputs, custom_generate=s2t_generate, selector=selector)  # faster, the same tokens in float32
```

Without an import, with the package installed (`pip install transformers-s2t`):
`model.generate(**inputs, custom_generate="{repository}", trust_remote_code=True)`.

It is loaded through `LocalSelector`, not as an ordinary LoRA adapter: adapter scope "{config.adapter_scope}",
proposals "{config.proposals}", {len(config.reserved_token_ids)} reserved tokens, {config.num_candidates} candidates
(`s2t_config.json`).

## Figures

{figures}

## Made with

{", ".join(f"{package} {found}" for package, found in _versions().items())}

```bibtex
{CITATION}
```
"""
    return text if calibration is None else with_calibration(text, calibration)


def with_calibration(card: str, section: str) -> str:
    """A card with this section at its end, in place of the one of an earlier calibration."""
    return f"{without_calibration(card)}\n{CALIBRATION_TITLE}\n\n{section}".lstrip()


def without_calibration(card: str) -> str:
    """A card without the section that calibration wrote."""
    return card.split(f"\n{CALIBRATION_TITLE}\n")[0].rstrip() + "\n"


def calibration_of(card: str) -> str | None:
    """The section of a card that calibration wrote, `None` for none."""
    _, title, section = card.partition(f"\n{CALIBRATION_TITLE}\n")
    return section.strip() + "\n" if title else None


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset is one of the Hub, and not a local folder."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found
