"""The maker of the embedded model: its corpus, its training, its dictionaries."""
