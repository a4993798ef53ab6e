"""The classic parts: a Q-network, experience replay, and a training loop."""
