"""Agents that learn nothing, to compare with: ``one_step`` reads the observation, ``planning`` searches ahead.

Begin with ``one_step.OneStepAgent``; ``agents.zoo`` makes them by name.
"""
