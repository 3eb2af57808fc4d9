"""Measuring, predicting and showing speed: what `flashmoe bench`, `plan` and `trace` are made of.

Nothing of the engine imports this package; plots need the extra ``flashmoe-engine[plot]``.
"""
