"""Restoring latents from a donor while a model answers: rankings, judges, refusals.

May import reading and below.
"""
