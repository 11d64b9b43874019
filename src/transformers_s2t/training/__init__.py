"""The trainer of S2T-Local selectors."""
