"""Settings of the commands, as frozen dataclasses. Light: no torch.

May import dictionaries.latent_set, model.sites and below.
"""
