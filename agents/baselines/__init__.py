"""Agents that learn nothing: one step ahead, or a search."""
