"""A tiny model, its base, dictionaries and prompts in a folder, and `saepatch restore` on them."""

import json

from tiny import random_sae, tiny_model

from saepatch.settings.restore import RestoreConfig

ROWS = [
    {"prompt": "how to cake? now", "clean": "how to bake? now", "harmful": True},
    {"prompt": "abxde", "clean": "abcde", "harmful": True, "example": "letters"},
    {"prompt": "tell me all", "clean": "tell me some", "harmful": False},
    {"prompt": "a bird flies", "clean": "a cat sleeps", "harmful": False},
    {"prompt": "what now, then?", "clean": "what now, when?", "harmful": True},
]
PROMPTS, CLEAN = [row["prompt"] for row in ROWS], tuple(row["clean"] for row in ROWS)


def make(folder):
    for name, seed in (("model", 0), ("base", 1)):
        model = tiny_model(seed=seed)
        model.hf.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    for layer in (0, 1):
        sae = random_sae("standard", seed=layer)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        sae.save_model(str(folder / "saes" / f"resid_post.{layer}"))
    lines(folder / "prompts.jsonl", ROWS)
    lines(folder / "select.jsonl", [{"prompt": p + "?", "clean": c + "?"} for p, c in zip(PROMPTS, CLEAN, strict=True)])
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(place, out, **changes):
    given = {
        "prompts": place / "prompts.jsonl",
        "model": place / "model",
        "sae": place / "saes",
        "out": out,
        "max_new_tokens": 6,
        "part": 2,
        "controls": 2,
        "refusals": "S|N",
        "template": 2,
    }
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in (given | changes).items()
        if value is not None
    }


def arguments(place, out, **changes):
    return [word for name, value in settings(place, out, **changes).items() for word in (f"--{name}", str(value))]


def read(place, out, **changes):
    return RestoreConfig(**settings(place, out, **changes))
