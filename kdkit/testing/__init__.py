"""What plugin authors test with: a pytest plugin, suites of checks for every kind, tiny models and fakes."""
