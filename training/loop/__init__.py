"""The training run: trainer, checkpoints, evaluation, plans, sweeps.

May import steps and below, and saepatch.
"""
