"""Helpers that several test files share: makers of videos, caches, models, and processes that misbehave."""
