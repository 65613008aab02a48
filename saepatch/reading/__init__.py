"""Interpreting single latents: cards, activity over texts, Patchscopes.

May import facts and below.
"""
