"""The card of a folder of labels: how they were made, how often the student's candidates suffice, and a picture.

Reads the output of `s2t label`; knows no models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from datasets import Dataset

from transformers_s2t.labels.folder import CARD_NAME, card_metadata, label_splits
from transformers_s2t.labels.schema import TrajectoryHeader


matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402


PICTURE_NAME = "divergence.png"
INK, KEPT, CHOSEN = "#1f2430", "#9aa1ad", "#1b9e77"


def draw(file: Path, labels: Dataset, header: TrajectoryHeader, stats: dict[str, Any]) -> None:
    """Divergence of all generated tokens with the threshold, and Hit@K at those above it."""
    divergence = np.concatenate([np.asarray(row, dtype=float) for row in labels["divergence"]])
    floor = 1e-4  # nats; below it the models agree, and a logarithm has to end somewhere
    shape = {"figsize": (9.6, 3.2), "width_ratios": (3, 2), "layout": "constrained", "facecolor": "white"}
    figure, (left, right) = plt.subplots(1, 2, **shape)
    high = max(float(divergence.max()), header.divergence_threshold * 2, floor * 10)
    edges = np.geomspace(floor, high, 41)
    edges = np.union1d(edges, max(header.divergence_threshold, floor))  # no bar has two colours
    counts, _ = np.histogram(divergence.clip(floor, high), edges)
    above = edges[:-1] >= header.divergence_threshold
    left.bar(edges[:-1], counts, np.diff(edges), align="edge", color=np.where(above, CHOSEN, KEPT))
    left.axvline(header.divergence_threshold, color=INK, linewidth=1)
    share = stats["kl_tokens"] / stats["tokens"]
    place = {"transform": left.get_xaxis_transform(), "va": "top", "color": INK, "fontsize": 9}
    left.text(header.divergence_threshold, 0.98, f" {share:.1%} of the tokens", **place)
    left.set(xscale="log", xlabel="KL(teacher || student), nats (the first bar: less)", ylabel="generated tokens")
    left.set_yscale("symlog", linthresh=10)
    hits = {int(k): 100 * value for k, value in stats["hit_at_k"].items()}
    places = range(len(hits))
    right.plot(places, hits.values(), "o-", color=CHOSEN)
    for x, value in zip(places, hits.values()):
        right.annotate(f"{value:.1f}", (x, value), (-3, 6), textcoords="offset points", ha="right", fontsize=9)
    right.set(xlabel="K", ylabel="Hit@K there, %", ylim=(0, 110), xlim=(-0.7, max(len(hits) - 0.6, 0.4)))
    right.set_xticks(list(places), [str(k) for k in hits])
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_data_card(
    folder: str | Path, labels: Dataset, header: TrajectoryHeader, stats: dict[str, Any], license: str | None = None
) -> None:
    """Writes `divergence.png` and `README.md`, whose first lines point `datasets` to the rows."""
    folder = Path(folder)
    student, teacher = (Path(name).name for name in (header.model, header.teacher_model))
    writes = {
        "greedy": "greedy rollouts of the student",
        "sample": f"rollouts of the student at temperature {header.temperature:g}",
        "s2t": "rollouts of the student, corrected by the teacher at decision points",
        "s2t-local": "rollouts of the student, corrected by a trained selector at decision points",
    }[header.rollout]
    hits = " | ".join(f"{value:.3f}" for value in stats["hit_at_k"].values())
    of_texts = ""
    if header.cross_tokenizer:
        of_texts = " The teacher has another tokenizer: its log-probabilities are those of texts, and estimates."
    sizes = " | ".join(f"Hit@{k}" for k in stats["hit_at_k"])
    sufficiency = (
        f"| {sizes} |\n|{'---|' * len(stats['hit_at_k'])}\n| {hits} |\n\n![Divergence and Hit@K]({PICTURE_NAME})\n"
        if stats["hit_at_k"]
        else "No point above the threshold is stored.\n"
    )
    parts = ", ".join(f"`{split}` {rows}" for split, rows in stats["splits"].items())
    card = f"""---
{card_metadata(label_splits(folder), license)}---

# Select to Think labels: {student}, taught by {teacher}

{stats["rows"]} trajectories ({writes}, at most {header.max_new_tokens} new tokens), {stats["tokens"]} generated
tokens, {stats["points"]} decision points with the student's {header.num_candidates} candidates and the teacher's
log-probabilities of them ([Select to Think](https://arxiv.org/abs/2604.26940)). Points: `{header.points}`.{of_texts}
Trajectories by split: {parts}. All of a problem's are in one.

## Local sufficiency

Where the models disagree most, at {stats["kl_tokens"]} tokens with a divergence of at least
{header.divergence_threshold:.4f} nats ({stats["kl_points"]} of them stored), how often the teacher's own token
is among the student's first K:

{sufficiency}
## Use

```python
from transformers_s2t import S2TConfig, S2TTrainer

trainer = S2TTrainer(model=student, args=S2TConfig(output_dir="adapter"), train_dataset="you/this-repository")
```

Columns and their units: `transformers_s2t.labels.schema.FEATURES`. `s2t_labels.json` holds every setting, the
fingerprints of the tokenizer and of the student, and the versions.
"""
    if stats["hit_at_k"]:
        draw(folder / PICTURE_NAME, labels, header, stats)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
