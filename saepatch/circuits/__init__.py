"""Circuits: edges between latents and other nodes, exact path patches, circuits and their measures.

May import measure and below.
"""
