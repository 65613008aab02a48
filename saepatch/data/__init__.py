"""Prompts, pairs and texts, from tasks, files and datasets.

May import dictionaries and below.
"""
