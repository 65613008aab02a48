"""Sparse autoencoders: loading through sae_lens, checks against the site, latents, bases, publishing.

May import model and below.
"""
