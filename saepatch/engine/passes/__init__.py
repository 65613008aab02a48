"""Passes that are kept, and resumed from a site as often as needed.

May import the rooms below engine.
"""
