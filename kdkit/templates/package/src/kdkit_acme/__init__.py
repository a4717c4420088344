"""A plugin for kdkit; ``plugin.py`` says what is in it."""
