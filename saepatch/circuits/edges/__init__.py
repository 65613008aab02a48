"""Edges between nodes: linear estimates, exact path patches, circuits of edges, attribution graphs.

May import circuits.nodes, circuits.residual and the rooms below circuits.
"""
