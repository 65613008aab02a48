"""Settings of the commands, as frozen dataclasses. Must not import torch.

May import dictionaries.latent_set, model.sites and below.
"""
