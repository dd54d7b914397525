"""Reinforcement learning: prompts, rollout, rewards, objectives and the loop that joins them."""
