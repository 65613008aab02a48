"""Rows, provenance, files, statistics, tables: what is written, and how it is summarised.

May import errors alone.
"""
