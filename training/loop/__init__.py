"""The training run: trainer, checkpoints, evaluation, plans, sweeps."""
