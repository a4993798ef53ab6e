"""Runs: train an agent, measure it on new prompts, keep everything in a folder. Begin with ``run.train``.

``config`` holds the settings, ``log`` and ``checkpoint`` the course of a training, ``optimum`` and ``report`` the
measuring.
"""
