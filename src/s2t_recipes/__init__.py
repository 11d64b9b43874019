"""What the scripts of recipes/ run: labels, training, calibration, evaluation, reports and the published tables.

The library, `transformers_s2t`, never imports this package. Install it with `pip install 'transformers-s2t[recipes]'`.
"""
