"""Pruning: what can be cut out of a transformer, and how to heal the cut."""
