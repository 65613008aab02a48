"""Exact sweeps and gradients: kept runs, shortcuts, components, corruptions, metrics.

May import splicing and below.
"""
