"""Interpreting single latents: cards, activity over texts, Patchscopes.

May import steering and below.
"""
