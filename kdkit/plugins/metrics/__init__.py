"""Metrics over predictions: text overlap, exact answers, perplexity and distance to the teacher."""
