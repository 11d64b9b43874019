"""The study behind docs/triggers.md, which benchmarks/triggers.py starts: what it compares, and under which names."""

PAIRS = ("embedded", "babyllama")
TRIGGERS = ("entropy", "margin", "router", "kl", "random")
CALIBRATED = TRIGGERS[:-1]
FIRED = ("to_correct", "first_is_best", "no_choice")


def bare_rate(rates: list[float]) -> float:
    """The rate at which the selector's score alone is compared with the fused one."""
    return 0.1 if 0.1 in rates else max(rates)
