"""Documents and settings of the small training runs that several test files make."""

from typing import Any

import torch

from training.config import SAEConfig, TrainingConfig

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "birds", "fly", "high", "up", "two", "dogs", "run", "home"]


def documents(n: int = 60, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + j % 15,), generator=generator)) + f" {j}"
        for j in range(n)
    ]


def small(**changes: Any) -> TrainingConfig:
    options: dict[str, Any] = {
        "tokens": 8192,
        "batch_size": 256,
        "context": 32,
        "forward_tokens": 512,
        "buffer": 1024,
        "held_out": 0.1,
        "eval_tokens": 500,
        "log_every": 8,
        "sae": SAEConfig(k=4, d_sae=48, dead_after=4000),
    }
    return TrainingConfig(**(options | changes))
