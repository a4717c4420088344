"""Rewards: form, passed tests, length, repetition, language, closeness to a reference or a teacher."""
