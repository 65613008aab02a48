"""What benchmarks share: random models and prompts, clocks and results, other libraries."""
