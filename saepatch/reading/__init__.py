"""What single latents are about: cards, activity over texts, patchscopes.

May import steering and below.
"""
