"""Faults that are made on purpose, for drills and tests: ``fault=[sigkill@120:1]``."""
