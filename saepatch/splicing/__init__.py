"""Splice dictionaries into a model: interventions, donors, the splice itself.

May import data and below.
"""
