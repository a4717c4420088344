"""A reward for kdkit: programs that ruff has nothing to say about."""
