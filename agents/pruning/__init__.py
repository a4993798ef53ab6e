"""Pruning: cut a transformer, and heal the cut by distillation. Begin with ``model.PrunedTransformerModel``.

``methods`` are the cuts by name, ``calibration`` the statistics that they choose by, ``healing`` the distillation.
"""
