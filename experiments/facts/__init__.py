"""The experiment on facts: where they are recalled, how edits of weights and of latents change them, how edits fail."""
