"""Verifiers of responses, and the processes that they run in."""
