"""Which latents do languages share, and where are concept and output language decided?"""
