"""Datasets: instruction rows, your own JSON Lines, and prompts that ship with kdkit."""
