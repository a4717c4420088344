"""A sandbox for kdkit: programs that a model wrote, each in a Docker container of its own."""
