"""What a token is called: one name for one token, in every kind of vocabulary."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from saepatch.data.forms import position_labels
from saepatch.data.pairs import PromptPair
from saepatch.facts import contexts
from saepatch.facts.contexts import Sampled
from saepatch.model.inputs.token_names import token_name
from saepatch.report import token_text

ROOT = Path(__file__).resolve().parents[2]
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x61>", "<0xE2>", "▁", "▁▁", "▁he", "he", "▁was", "was", "a", "h", "e"]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary as Llama 2's: words begin with ▁, what is missing falls back on bytes, decoding drops a space."""
    merges = [("h", "e"), ("w", "a"), ("wa", "s"), ("▁", "he"), ("▁", "was"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate([*PIECES, "w", "s", "wa"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_word_starts_are_kept_and_bytes_shown_as_bytes():
    tokenizer = sentencepiece_tokenizer()
    names = [token_name(tokenizer, i) for i in range(len(PIECES))]
    assert names[:6] == ["<unk>", "<s>", "</s>", "⟨0A⟩", "⟨61⟩", "⟨E2⟩"]
    assert names[6:] == [" ", "  ", " he", "he", " was", "was", "a", "h", "e"]
    assert len({token_text(name) for name in names}) == len(PIECES)


def test_no_space_is_cleaned_away_from_a_token():
    pieces = ["Ġ.", ".", "Ġ's", "'s"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    cleaning = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    assert [token_name(cleaning, i) for i in range(4)] == [" .", ".", " 's", "'s"]


def test_ends_of_words_are_kept():
    vocabulary = {"she</w>": 0, "she": 1, "d</w>": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert [token_name(wrapped, i) for i in range(3)] == ["she ", "she", "d "]


def test_bytes_of_a_byte_level_vocabulary():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é a\n", add_special_tokens=False)["input_ids"]
    assert [token_name(tokenizer, i) for i in ids] == ["⟨C3⟩", "⟨A9⟩", " ", "a", "\n"]
    assert token_name(tokenizer, 5000) == "⟨id 5000⟩"


def test_axes_and_models_use_the_names():
    model = replace(tiny_model("gpt2"), tokenizer=sentencepiece_tokenizer())
    ids = model.encode("he was he")
    assert model.token_texts(ids) == [" he", " was", " he"]
    pairs = [PromptPair("he was he", "he was was", "a", "h"), PromptPair("he was was", "he was he", "a", "h")]
    assert position_labels(model, pairs) == ["0 ␣he", "1 ␣was", "2 [␣he/␣was]"]


def test_a_token_is_named_in_one_place():
    by_hand = re.compile(r"tokenizer\.decode\(\[|convert_ids_to_tokens")
    sources = [path for room in ("saepatch", "training", "experiments") for path in (ROOT / room).rglob("*.py")]
    naming = [path.name for path in sources if by_hand.search(path.read_text(encoding="utf-8"))]
    assert naming == ["token_names.py"]


STORIES = ROOT.parent / "shared" / "models" / "stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not beside this clone")
def test_a_real_vocabulary_has_no_two_tokens_of_one_name():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    names = [token_name(tokenizer, i) for i in range(len(tokenizer))]
    assert len(set(names)) == len(tokenizer) == 512
    assert names[358] == " she"
    assert names[13] == "⟨0A⟩"
    assert len({token_text(name) for name in names}) == 512


def test_a_continuation_keeps_its_first_space_in_every_vocabulary():
    """Decoders of SentencePiece drop it, those of byte-level vocabularies do not."""
    pieces = sentencepiece_tokenizer()
    model = replace(tiny_model(), tokenizer=pieces)
    he, was = pieces.convert_tokens_to_ids(["▁he", "was"])
    assert pieces.decode([he]) == "he"
    assert model.continuation([he, was]) == " hewas"
    assert model.continuation([was, he]) == "was he"
    assert model.continuation([]) == ""
    assert model.continuation([1, he, 2], skip_special_tokens=True) == " he"
    other = tiny_model()
    ids = other.tokenizer(" the cat", add_special_tokens=False)["input_ids"]
    assert other.continuation(ids) == " the cat"
    broken = other.tokenizer("é", add_special_tokens=False)["input_ids"]
    assert other.continuation(broken[1:]) == other.tokenizer.decode(broken[1:])


def test_generated_texts_continue_their_prompts():
    model = replace(tiny_model(), tokenizer=sentencepiece_tokenizer())
    (text,) = model.generate(["he was"], 6)
    (ids,) = model.continue_ids(["he was"], 6)
    assert text == model.continuation(ids)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_sampled_prefixes_keep_their_first_space(monkeypatch, seed):
    model = replace(tiny_model(), tokenizer=sentencepiece_tokenizer())
    was, he = PIECES.index("▁was"), PIECES.index("▁he")

    def sampled(*given):
        assert [generator.initial_seed() >= 0 for generator in given[-1]] == [True]
        return [[was, he]]

    monkeypatch.setattr(contexts, "sample_ids", sampled)
    assert Sampled(((2, 1),), seed=seed).prefixes(model).texts == ["", "The was he. "]
