"""Tests of prompts with pictures, on tiny random vision-language models."""
