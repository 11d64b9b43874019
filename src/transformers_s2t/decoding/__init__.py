"""Decoding with a selector: `s2t_generate`, the `S2T` logits processor, and the step that both share."""
