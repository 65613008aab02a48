"""Choosing latents for steering, generating steered text, and measuring its fluency.

May import circuits and below.
"""
