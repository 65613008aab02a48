"""One latent or several? Steering by the top K latents."""
