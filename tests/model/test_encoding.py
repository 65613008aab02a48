"""Token ids of prompts: what tokenizers put before and after a text, and a BOS where they have none."""

from dataclasses import replace

import pytest
import torch
from tiny import byte_tokenizer, random_dictionary, tiny_model
from tokenizers import processors

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.errors import UserError
from saepatch.model.loading.load import load_model, wrap_model
from saepatch.steering.contrasts import contrast
from training.config import TrainingConfig
from training.data.rows import rows
from training.loop.checks import check_model

SPECIAL = [("<bos>", 0), ("<eos>", 1)]


@pytest.fixture(scope="module")
def plain():
    return tiny_model("gpt2", seed=3)


def with_template(model, template):
    """The same weights with a tokenizer that puts other tokens around a text."""
    tokenizer = byte_tokenizer()
    special = [each for each in SPECIAL if each[0] in template]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return wrap_model(model.hf, tokenizer, "another")


def without_bos(model):
    other = with_template(model, "$A")
    other.tokenizer.bos_token = None
    return other


@pytest.mark.parametrize("template", ["<bos> $A <eos>", "<bos> $A <eos> <eos>"])
def test_tokens_that_a_tokenizer_appends_are_no_part_of_a_prompt(plain, template):
    ends, texts = with_template(plain, template), ["a tree", "the sea!"]
    assert ends.appended == [1] * template.count("<eos>")
    assert not plain.appended
    assert [ends.encode(text) for text in texts] == [plain.encode(text) for text in texts]
    torch.testing.assert_close(ends.next_logits(ends.tokenize(texts)), plain.next_logits(plain.tokenize(texts)))
    assert ends.continue_ids(texts, 5) == plain.continue_ids(texts, 5)
    dictionary, other = random_dictionary("resid_post.1", "standard"), ["a bush", "the sky"]
    scores = [contrast(model, dictionary, texts, other, "last") for model in (ends, plain)]
    torch.testing.assert_close(*scores)
    pairs = [PromptPair("a tree", "a bush", "x", "y")]
    assert batch_pairs(ends, pairs).answer.tolist() == batch_pairs(plain, pairs).answer.tolist()
    assert rows(ends, texts, 16) == rows(plain, texts, 16)


def test_an_end_of_text_that_is_written_stays(plain):
    ends = with_template(plain, "<bos> $A <eos>")
    assert ends.encode("ab<eos>")[-2:] == [plain.encode("b")[-1], 1]
    assert ends.encode("<bos>ab<eos>") == ends.encode("ab<eos>")


def test_a_bos_that_there_is_not_is_refused_or_named(plain, tmp_path):
    bare = without_bos(plain)
    with pytest.raises(UserError, match="has no BOS to prepend: name a token"):
        replace(bare, prepend_bos=True)
    bare.hf.save_pretrained(tmp_path)
    bare.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no BOS to prepend: name a token"):
        load_model(str(tmp_path), prepend_bos=True)
    with pytest.raises(UserError, match="prepend_bos '<none>' is not in the vocabulary"):
        load_model(str(tmp_path), prepend_bos="<none>")
    named = load_model(str(tmp_path), prepend_bos="<eos>")
    assert named.encode("ab") == named.encode("<eos>ab") == [1, *bare.encode("ab")]
    assert named.tokenize(["ab"]).ordinary.tolist() == [[False, True, True]]
    plain.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer's BOS is '<bos>', not '<eos>'"):
        load_model(str(tmp_path), prepend_bos="<eos>")


def test_documents_are_not_packed_without_a_bos_between_them(plain):
    config = TrainingConfig(sites=["resid_post.1"], pack=True, context=16)
    sites = [random_dictionary("resid_post.1").site]
    for bare in (without_bos(plain), with_template(plain, "$A")):
        with pytest.raises(UserError, match=r"adds no BOS between them: set prepend_bos \(true, or a token's text"):
            check_model(bare, sites, config)
        check_model(bare, sites, replace(config, pack=False))
    check_model(replace(bare, prepend_bos=True), sites, config)
