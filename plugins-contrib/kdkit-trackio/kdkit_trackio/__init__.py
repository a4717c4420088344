"""A tracker for kdkit: metrics of every run in a local trackio database."""
