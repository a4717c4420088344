"""Finding, loading, shrinking and saving causal language models.

``catalogue`` and ``locate`` import neither torch nor transformers, so that a recipe is checked at once; the other
modules do.
"""
