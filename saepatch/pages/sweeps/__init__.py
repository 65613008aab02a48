"""Figures of the runs of `patch` and `attribute`, and the data that they are drawn from.

May import pages.cards, charts and gather, and the rooms below pages.
"""
