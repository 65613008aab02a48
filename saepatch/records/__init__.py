"""Rows, provenance, files, statistics and tables: how results are stored and summarised.

May import errors alone.
"""
