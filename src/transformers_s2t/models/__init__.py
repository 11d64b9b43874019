"""What the package asks of any causal language model: its views, forwards, caches, and what is refused."""
