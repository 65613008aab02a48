"""The study of a real language model: patching, dictionaries, latents and causal tracing on pairs it gets right."""
