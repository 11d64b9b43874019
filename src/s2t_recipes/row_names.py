"""Names and groups of the rows of a report. Knows policies by name and nothing else."""

from __future__ import annotations


#: Groups of rows from top to bottom: title and colour.
GROUPS = {
    "baseline": ("The small model alone", "#9aa1ad"),
    "tuned": ("The small model, changed by training", "#8e6bb0"),
    "local": ("S2T-Local, no teacher at inference", "#1b9e77"),
    "local-oracle": ("S2T-Local, triggered by the teacher", "#8fd0bb"),
    "teacher": ("The teacher runs at inference", "#4878a8"),
    "control": ("Controls", "#d9a441"),
}
NAMES = {
    "greedy": "greedy",
    "teacher": "teacher, greedy",
    "takeover": "Takeover",
    "sft": "LoRA on the teacher's texts",
    "kd": "LoRA distillation",
    "sft-sampled": "LoRA on sampled texts of the teacher",
    "kd-sampled": "LoRA distillation on sampled texts",
    "s2t": "S2T (teacher selects)",
    "s2t-local": "S2T-Local",
    "s2t-local-bare": "S2T-Local, no fusion",
    "second": "second candidate",
    "random": "random candidate",
    "prior": "token prior",
    "zero-shot": "zero-shot scorer",
}
CONTROLS = ("second", "random", "prior", "zero-shot")
TRIGGERS = {"always": "every step", "kl": "KL"}


def group_of(row: dict) -> str:
    name = row["policy"]
    if row.get("is_tuned"):
        return "tuned"
    if name.startswith("s2t-local"):
        return "local-oracle" if row["trigger"] == "kl" else "local"
    if name in ("teacher", "takeover", "s2t"):
        return "teacher"
    return "control" if name in CONTROLS else "baseline"


def grouped(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Title and rows of each group that has any; rows of one policy stay together."""
    out = []
    for group, (title, _) in GROUPS.items():
        members = [row for row in rows if group_of(row) == group]
        first_seen = [row["policy"] for row in members]
        members.sort(key=lambda row: first_seen.index(row["policy"]))
        if members:
            out.append((title, members))
    return out


def name_of(policy: str) -> str:
    if policy.startswith("best@"):
        return f"any of {policy[5:]} samples (oracle)"
    if policy.endswith("-second"):
        return f"{name_of(policy.removesuffix('-second'))}, second rate"
    return f"majority of {policy[4:]} samples" if policy.startswith("maj@") else NAMES.get(policy, policy)


def label_of(row: dict) -> str:
    """ "S2T-Local · margin 10 %" and the like."""
    name = name_of(row["policy"])
    if row["trigger"] is None:
        return name
    rate = "" if row["target_rate"] is None else f" {100 * row['target_rate']:g} %"
    return f"{name} · {TRIGGERS.get(row['trigger'], row['trigger'])}{rate}"
