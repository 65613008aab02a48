"""Creation of the embedded model: its corpus, its training, its dictionaries.

May import loop and below, and saepatch.
"""
