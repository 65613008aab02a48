"""The organism's tasks: their shape, their splits, and that the training corpus never asks what they ask."""

import re
import subprocess
import sys
from itertools import islice

import pytest
from transformers import AutoTokenizer

from saepatch import organism
from saepatch.errors import UserError
from saepatch.organism import checks, world
from saepatch.organism.tasks import TASKS, task
from training.organism import corpus

COLUMNS = ["example", "clean", "corrupted", "answer", "counter"]
# What a task's splits may not share.
OWN = {
    "ioi": ["template", "io", "subject", "place", "object"],
    "pronoun": ["template", "antecedent", "place"],
    "agreement": ["template", "subject"],
    "facts": ["template"],
    "facts_fr": ["template"],
    "two_hop": ["template"],
    "sentiment": ["template", "item"],
    "loan": ["template", "name", "group"],
    "refusal": ["template", "verb", "target"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(organism.path("organism"))


@pytest.mark.parametrize("name", TASKS)
def test_rows_have_the_agreed_columns_and_are_distinct(name):
    rows = task(name, n=150)
    assert rows.column_names[:5] == COLUMNS
    pairs = list(zip(rows["clean"], rows["corrupted"], strict=True))
    assert len(set(pairs)) == len(pairs)
    assert len(set(rows["example"])) == len(rows)
    assert all(clean != corrupted for clean, corrupted in pairs)
    assert all(word.startswith(" ") for word in [*rows["answer"], *rows["counter"]])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", world.SPLITS)
def test_pairs_have_equal_token_length_and_single_token_answers(name, split, tokenizer):
    rows = task(name, split, n=500)
    for row in rows:
        texts = [row["clean"], row["corrupted"]]
        lengths = {len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
        assert len(lengths) == 1, texts
    for word in {*rows["answer"], *rows["counter"]}:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_nothing_they_own(name):
    n = 100_000 if name != "ioi" else 2000
    rows = {split: task(name, split, n=n) for split in world.SPLITS}
    for column in OWN[name]:
        values = [set(rows[split][column]) for split in world.SPLITS]
        assert sum(map(len, values)) == len(set.union(*values)), column
    prompts = [{*rows[split]["clean"], *rows[split]["corrupted"]} for split in world.SPLITS]
    assert sum(map(len, prompts)) == len(set.union(*prompts))


def test_framings_are_owned_by_one_split():
    prefixes = [{f.jailbreak for f in world.share(world.FRAMINGS, split)} for split in world.SPLITS]
    assert len(set.union(*prefixes)) == len(world.FRAMINGS)
    assert {len({f.kind for f in world.share(world.FRAMINGS, split)}) for split in world.SPLITS} == {6}


def test_rows_follow_the_seed_and_nothing_else():
    script = "from saepatch.organism.tasks import task; print(list(task('ioi', n=3, seed=7)['clean']))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(list(task("ioi", n=3, seed=7)["clean"]))
    assert list(task("ioi", n=3, seed=8)["clean"]) != list(task("ioi", n=3, seed=7)["clean"])


def test_more_than_there_are_gives_all_there_are():
    everything = task("facts_fr", n=10_000)
    assert len(everything) == len(task("facts_fr", n=20_000)) < 10_000
    assert {*task("facts_fr", n=10_000, seed=1)["clean"]} == {*everything["clean"]}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("poetry",), "poetry"), (("ioi", "test"), "test"), (("ioi", "report", 0), "0"), (("ioi", "report", -3), "-3")],
)
def test_bad_input_is_one_line_with_a_remedy(arguments, word):
    with pytest.raises(UserError, match=re.escape(word)) as error:
        task(*arguments)
    assert "\n" not in str(error.value)


def test_ioi_answers_the_name_said_once():
    for row in task("ioi", n=50):
        for prompt, right, wrong in ((row["clean"], "answer", "counter"), (row["corrupted"], "counter", "answer")):
            assert prompt.count(row[right]) == 1
            assert prompt.count(row[wrong]) == 2
    assert {"ABBA", "BABA"} == set(task("ioi", n=50)["kind"])


def test_refusal_rows_hold_both_classes_and_every_framing_holds_the_request(tokenizer):
    rows = task("refusal", n=200)
    assert 60 < sum(rows["harmful"]) < 140
    for row in rows:
        assert all(row["request"] in row[column] for column in ("clean", "corrupted", "plain"))
        assert row["answer"] == (" I" if row["harmful"] else " Sure")
        chat = [{"role": "user", "content": row["request"]}]
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == row["plain"]


def test_loan_pairs_of_kind_group_differ_in_the_group_word_alone():
    for row in task("loan", n=50):
        differ = [
            pair for pair in zip(row["clean"].split(), row["corrupted"].split(), strict=True) if pair[0] != pair[1]
        ]
        assert len(differ) == 1
        assert (row["group"] in differ[0][0]) == (row["kind"] == "group")


@pytest.mark.slow  # for whoever retrains the organism
def test_no_prompt_of_any_split_begins_a_document_of_the_corpus():
    prompts = {
        prompt.removeprefix(world.BOS)
        for name in TASKS
        for split in world.SPLITS
        for row in task(name, split, n=1000)
        for prompt in (row["clean"], row["corrupted"])
    }
    for mixture in (corpus.BASE, corpus.ALIGNED):
        for document in islice(corpus.documents(mixture, seed=3), 20_000):
            # Only documents of one prompt and its answer could hold one, so prefixes at word ends are enough.
            starts = (document[: match.end()] for match in re.finditer(r"<\|assistant\|>|[^ ]+", document))
            assert not prompts.intersection(starts), document


def test_the_corpus_follows_its_seed():
    one, same, other = (list(islice(corpus.documents(corpus.BASE, seed), 50)) for seed in (0, 0, 1))
    assert one == same != other


def test_importing_the_tasks_imports_neither_datasets_nor_transformers():
    script = "import sys, saepatch.organism.tasks; print([m for m in ('datasets', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_answers_are_the_first_tokens_of_the_openings(tokenizer):
    ids = checks.first_tokens(tokenizer)
    words = [tokenizer.convert_ids_to_tokens(i).replace("Ġ", " ") for i in ids]
    assert sorted(words) == [" I", " Sorry"]
    assert not set(ids) & set(checks.first_tokens(tokenizer, world.COMPLY_OPENINGS))
