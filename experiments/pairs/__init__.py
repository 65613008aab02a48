"""Questions about pairs of prompts: the study, its stages, its page."""
