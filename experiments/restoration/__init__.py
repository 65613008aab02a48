"""How few latents bring refusals back?"""
