"""What the study compares, under the names that its report has for it."""

PAIRS = ("embedded", "babyllama")
TRIGGERS = ("entropy", "margin", "router", "kl", "random")
CALIBRATED = TRIGGERS[:-1]
FIRED = ("to_correct", "first_is_best", "no_choice")
BARE_RATE = 0.1


def bare_rate(rates: list[float]) -> float:
    """The rate at which the selector's score alone is compared with the fused one."""
    return BARE_RATE if BARE_RATE in rates else max(rates)
