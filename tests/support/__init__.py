"""Helpers that several tests use; import them as ``support.<module>``."""
