"""The ``kdkit`` command. ``app`` holds signatures; every other module is the body of a command."""
