"""Reinforcement learning from verifiable rewards (GRPO)."""
