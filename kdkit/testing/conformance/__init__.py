"""Test suites for plugin authors: subclass one in a test file, and pytest runs it."""
