"""Training of dictionaries and of the embedded model: `python -m training CONFIG.yaml`, `python -m training.organism`.

May import saepatch, but not experiments.
"""
