"""The study behind docs/triggers.md: five triggers on two pairs of models. benchmarks/triggers.py starts it."""
