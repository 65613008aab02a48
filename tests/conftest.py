"""Settings of the whole test run."""

import signal

import torch

torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring

# A shell starts its background jobs with SIGINT ignored, and processes that tests start and interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
