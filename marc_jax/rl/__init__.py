"""Rewards, advantages, losses, rollouts and update steps."""
