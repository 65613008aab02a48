"""saepatch: patch, steer and restore single SAE latents in Hugging Face causal language models."""

import lazy_loader

# `__init__.pyi` lists the public names and where each is defined. A name is imported on first use, so that
# `import saepatch` and `saepatch --help` stay quick.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
