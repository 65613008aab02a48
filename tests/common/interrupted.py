"""Train in child processes that are killed at random moments, and go on until a run ends.

Children are forked, so that what takes long to import is imported once. OUT/whole is the same run with nothing in its
way, OUT/run the one that was killed. Usage: interrupted.py OUT KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a pool of threads would not survive the fork

import sae_lens  # noqa: E402, F401
from runs_of_training import documents, small  # noqa: E402
from tiny import tiny_model  # noqa: E402

from training.loop.trainer import train_saes  # noqa: E402

TOKENS = 61_440


def child(out: Path) -> None:
    """One attempt: exits with 0 when the run is complete, 3 when it was stopped with a checkpoint.

    A SIGINT before training begins is an interrupt as any other: 130.
    """
    code = 1
    try:
        outcome = train_saes(tiny_model(), documents(), small(tokens=TOKENS, resume=True, checkpoint_every=512), out)
        code = 3 if outcome.stopped else 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def main(out: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    done: list[str] = []
    codes: list[int] = []
    while True:
        process = os.fork()
        if process == 0:
            child(out / "run")
        if len(done) < kills:
            time.sleep(chance.uniform(0.05, 0.5))
            sent = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                os.kill(process, sent)
                done.append(sent.name)
            else:
                break
        _, status = os.waitpid(process, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] in (0, 1):
            break
    train_saes(tiny_model(), documents(), small(tokens=TOKENS), out / "whole")
    sys.stdout.write(json.dumps({"killed": done, "codes": codes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
