"""Measurements: patching, attribution, effects, curves, controls, baselines, splice quality.

May import engine and below.
"""
