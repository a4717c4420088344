"""A plugin for a kdkit that does not exist yet."""
