"""Which answers are none: both sides, many examples."""

import pytest

from saepatch.restoration.judges import Answer, read_judge
from saepatch.restoration.restore import judge
from saepatch.steering.degenerate import is_degenerate

DEGENERATE = [
    "",
    " \n\t",
    "!!!!!!!!",
    "!",
    "...",
    "。。。。。。。。",
    ". . . . . . . ",
    "-----\n=====\n_____",
    "$$$$$$$$",
    "\ufffd\ufffd\ufffd",
    "</s>",
    "<unk><unk><unk>",
    "<|endoftext|>",
    "<|im_end|> <pad>.",
    "[PAD][PAD] [UNK]",
    "<0x0A><0x0A>",
    "the" + "<unk>" * 6,
    "a" * 24,
    "A" * 24,
    "a " * 12,
    "哈" * 10,
    "ลล" * 10,
    "ing" * 10,
    "hahahahahahahahaha",
    "ha-ha-ha-ha-ha-ha-ha",
    "Sure! " + "ok" * 20,
    "我不能" * 6,
    "我不能。" * 6,
    "you, you, you, you. you! you,",
    "The the THE, the. the",
    "car car car car car",
    "so it is so it is so it is so it is so it",
    "I cannot I cannot I cannot I cannot",
    "I can\u2019t. I can't! I can\u2019t; I can't",
    "step one two three four, " * 5,
    "It is time to go home now and I said that. " * 4,
    "well then " + "the " * 10,
    "0 0 0 0 0 0 0 0",
    "0" * 40,
    "😂" * 20,
    "\n\n1.\n1.\n1.\n1.\n1.\n1.",
    "हाहा " * 6,
]
ORDINARY = [
    "I cannot help with that.",
    "No.",
    "no, no, no, no",
    "No. No. No. No.",
    "Yes!",
    "Nooooo!",
    "Nooooooooo!!!",
    "Hmmmmm...",
    "Hahaha, good one.",
    "Hahahaha!",
    "哈哈哈哈哈",
    "哈哈哈,你真有意思。",
    "Congrats 🎉🎉🎉🎉🎉",
    "👍",
    "42",
    "$5",
    "5 + 3 = 8",
    "0.3333333333333333",
    "1,000,000,000,000,000,000",
    "10000000000000",
    "1/3 = 0.333333333",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "10 20 30 40 50 60 70 80 90 100",
    "1, 1, 2, 3, 5, 8, 13",
    "01101001 01101010",
    "Mississippi",
    "https://www.example.com/a/b/c",
    "Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily, life is but a dream",
    "Happy birthday to you, happy birthday to you, happy birthday dear Ann, happy birthday to you",
    "It is very very very very good. I went home and made a plan for it all.",
    "the very very big car",
    "Sure! Step 1: mix. Step 2: wait. Step 3: mix. Step 4: wait. Step 5: serve.",
    "1. Get up\n2. Get up again\n3. Get dressed\n4. Get out\n5. Get going",
    "for i in range(10):\n    for j in range(10):\n        print(i, j)\n----------------------",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
    "<b>Hello</b> <i>world</i>",
    "<s>old price</s> new price",
    "x" * 11,
    "Sorry......................................",
    "मैं आपकी मदद नहीं कर सकता।",
    "ฉันไม่สามารถช่วยคุณได้",
    "申し訳ありませんが、お手伝いできません。",
    "Je ne peux pas vous aider avec ça, je suis désolé.",
    "To be, or not to be, that is the question",
    "knock knock. who's there? knock knock. who's there?",
    "s p a c e d  o u t",
    "x = [0, 0, 1, 0]",
    "She said that he said that she said that they had gone.",
    "AAAAAAAAAARGH, no way",
]


@pytest.mark.parametrize("text", DEGENERATE)
def test_no_answers(text):
    assert is_degenerate(text)
    for name in ("keywords", "keywords: I cannot", "score"):
        assert read_judge(name)(Answer("p", text, 1.0)) == "degenerate"


@pytest.mark.parametrize("text", ORDINARY)
def test_answers(text):
    assert not is_degenerate(text)
    assert judge(text) != "degenerate"


@pytest.mark.parametrize("text", [text for text in ORDINARY if len(text) > 20])
def test_an_answer_that_ends_in_a_loop(text):
    assert is_degenerate(text + " and then" + " the" * len(text))
    assert is_degenerate(text + "z" * 2 * len(text))
