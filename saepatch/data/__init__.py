"""Prompts, prompt pairs and texts from tasks, files and datasets.

May import settings and below.
"""
