"""Runs on the disk: what resumes them, their parts, merging, the catalogue of finished ones.

May import restoration and below.
"""
