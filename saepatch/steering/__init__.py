"""Choosing latents to steer by, steered text, and what steering costs it.

May import measure and below.
"""
