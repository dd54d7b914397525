"""Rollout: where the policy's responses come from."""
