"""A metric for kdkit: tokens of answer and reference matched by their embeddings."""
