"""Plans a recipe, runs its stages in worker processes, and keeps their results. Knows stages, not algorithms.

``facade`` is the Python API. ``plan`` computes content keys (``keys``) and asks the ``store`` what is done; ``runner``
works through the plan; ``launch`` starts a ``worker`` process per stage, which ``execute``s it with a ``context``.
"""
