"""What the engine measures: patching, attribution, effects, curves, controls, baselines, quality.

May import engine and below.
"""
