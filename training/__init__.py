"""Trains dictionaries, and the embedded model: `python -m training CONFIG.yaml`, `python -m training.organism`.

May import saepatch, and nothing of experiments.
"""
