"""Candidates behind one prefix: how the small model reads them, in decoding and in training."""
