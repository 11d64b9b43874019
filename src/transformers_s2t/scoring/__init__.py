"""How the small model reads candidates after a prefix, in decoding and in training."""
