"""Language models: sites, families, loading, hooks (the one file that registers any), positions.

May import organism and below.
"""
