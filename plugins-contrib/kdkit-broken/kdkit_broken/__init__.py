"""Plugins for kdkit that do not work, each in a way of its own."""
