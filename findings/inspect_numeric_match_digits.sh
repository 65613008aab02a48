#!/bin/bash
# inspect-ai 0.3.285, numpy 2.4.6
#
# Behaviour: the scorer match(numeric=True) compares numbers rounded to five significant digits. On an
# addition task whose answers are all wrong by one, it reports an accuracy of 0 for five-digit sums and of
# 0.88 and 0.98 for six- and seven-digit ones. An answer of 7654349 counts as 7654321.
#
# Why it is surprising: it is the option meant for exact arithmetic answers, nothing is logged, and the
# answer it records is the rounded one ("7.6543e+06"). Tests with small numbers pass; a study of how a
# model adds finds that accuracy rises with the number of digits, and patching runs whose effect is on
# the last digits show none. match(numeric=False) on the same outputs gives 0.
#
# Seen: every answer one too large: 4 digits 0.0, 5 digits 0.0, 6 digits 0.88, 7 digits 0.98 (the rest
#       round the other way); 28 too large, 7 digits: 0.82; as text 0.0 and 0.0
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check inspect-ai==0.3.285 numpy==2.4.6
cd "$tmp"
cat > show.py <<'PY'
import random

from inspect_ai import Task, eval as run
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import match


def accuracy(digits, error, numeric=True):
    draw = random.Random(digits)
    samples, outputs = [], []
    for _ in range(50):
        a, b = (draw.randrange(10 ** (digits - 1) // 2, 10**digits // 2) for _ in "ab")
        samples.append(Sample(input=f"{a}+{b}=", target=str(a + b)))
        output = ModelOutput.from_content("mockllm/model", f"The sum is {a + b + error}")
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        outputs.append(output)
    task = Task(dataset=MemoryDataset(samples), scorer=match(numeric=numeric))
    model = get_model("mockllm/model", custom_outputs=outputs)
    log = run(task, model=model, display="none", log_dir="logs", max_samples=1)[0]
    assert log.status == "success", log.error.message
    answers = [sample.scores["match"].answer for sample in log.samples]
    return log.results.scores[0].metrics["accuracy"].value, answers[0]


wrong = {digits: accuracy(digits, 1) for digits in (4, 5, 6, 7)}
text = {digits: accuracy(digits, 1, numeric=False)[0] for digits in (4, 7)}
print("one too large", wrong)
print("28 too large, 7 digits", accuracy(7, 28), "as text", text)
assert wrong[4][0] == wrong[5][0] == 0
assert wrong[6][0] >= 0.8 and wrong[7][0] >= 0.9
assert "e+06" in wrong[7][1] and accuracy(6, 0)[0] == 1
assert text == {4: 0, 7: 0}
PY
"$tmp/venv/bin/python" show.py
