"""Runs on disk: the resumable driver, parts, merging, the catalogue of finished runs.

May import restoration and below.
"""
