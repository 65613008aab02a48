"""Results as values: effects and screens, with their rows, tables and figures.

May import the rooms below measure.
"""
