"""Passes under plain hooks, one whole pass each: the literal form of what the package does faster."""

from contextlib import ExitStack

import torch

from saepatch.model.sites import READ_AT_INPUT


def hooked(model, site, edit):
    module = model.layout.module(site)

    def on_output(_module, _args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    def on_input(_module, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    if site.stream in READ_AT_INPUT:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def forward(model, text, edits):
    """Next-token logits of a whole pass under hooks."""
    with ExitStack() as stack:
        for site, edit in edits.items():
            stack.callback(hooked(model, site, edit).remove)
        return model.hf(input_ids=torch.tensor([model.encode(text)])).logits[0, -1].double()
