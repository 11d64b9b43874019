"""Causal language models as S2T runs them: views, forwards and caches."""
