"""Splicing dictionaries into a model: interventions, donors, and the splice context.

May import data and below.
"""
