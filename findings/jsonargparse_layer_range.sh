#!/bin/bash
# jsonargparse 4.53.0, PyYAML 6.0.3
#
# Behaviour: an option typed `int | str`, meant for one layer or a range of layers, takes `8:12` as the
# number 492 (8 times 60 plus 12). A plain `int` option accepts `8:12` as well, and so does a config file.
#
# Why it is surprising: nothing about the neighbouring ranges warns of it. `0:12` stays the text "0:12"
# (and is refused for an int), `8:64` stays text, `:12` and `12:` stay text; `8:12`, `10:20` and `4:8:2`
# become numbers. A script tried on layers 0:12 works, and on 8:12 it goes to layer 492 or, where layers
# are taken modulo or filtered with `<=`, to a wrong one without an error. The order of the union decides:
# `str | int` keeps every range as text. (The loader's rule for base 60 asks for a first part that does
# not begin with 0 and for later parts under 60.)
#
# Seen: {'0:12': '0:12', '8:12': 492, '8:64': '8:64', '10:20': 620, '4:8:2': 14882, ':12': ':12'}
#       int: 8:12 -> 492, 0:12 refused; str | int: 8:12 -> '8:12'; config file "layers: 8:12" -> 492
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tmp/lib" jsonargparse==4.53.0 PyYAML==6.0.3
cd "$tmp"
printf 'layers: 8:12\n' > run.yaml
cat > show.py <<'PY'
import contextlib
import io
from typing import Union

import jsonargparse


def patch(layers: Union[int, str] = 0, layer: int = 0, text_first: Union[str, int] = 0):
    return layers, layer, text_first


def run(*args):
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return jsonargparse.auto_cli(patch, args=list(args))
        except SystemExit:
            return "refused"


ranges = {text: run("--layers", text)[0] for text in ("0:12", "8:12", "8:64", "10:20", "4:8:2", ":12")}
print(ranges)
print(run("--layer", "8:12"), run("--layer", "0:12"), run("--text_first", "8:12"), run("--config", "run.yaml"))
assert ranges == {"0:12": "0:12", "8:12": 492, "8:64": "8:64", "10:20": 620, "4:8:2": 14882, ":12": ":12"}
assert run("--layer", "8:12")[1] == 492 and run("--layer", "0:12") == "refused"
assert run("--text_first", "8:12")[2] == "8:12"
assert run("--config", "run.yaml")[0] == 492
PY
PYTHONPATH=$tmp/lib python3 show.py
