"""How small a circuit a behaviour needs, in nodes and in edges, by several rankings."""
