"""Text that is no answer: empty, of punctuation or special tokens alone, or one thing over and over."""

import re
import unicodedata

TIMES = 4  # a run of words this often in a row is a loop; of a single word one more: people do say "no, no, no, no"
CHARACTERS = 5  # a run of characters this often, at least WIDTH wide: people do write "hahahaha" and "nooooo"
WIDTH = 12  # ideographs and the like are 2 wide
LONGEST_WORDS, LONGEST_CHARACTERS = 64, 24  # of a run: what this costs grows with them
DIGITS = 30  # of digits, so many: 0.3333333333 and 1000000000000 are numbers

SPECIAL = re.compile(  # special tokens that were written out
    r"</?(?:unk|s|pad|bos|eos|mask|cls|sep|eot|endoftext|start_of_turn|end_of_turn|unused\d+|extra_id_\d+|0x[0-9a-f]{2})>"
    r"|<[|｜][^<>|｜]{1,40}[|｜]>|\[(?:pad|unk|cls|sep|mask|/?inst)\]",
    re.IGNORECASE,
)
MARK = "\ue000"  # stands for one of them, as a word of its own


def is_degenerate(text: str) -> bool:
    """Whether text is empty, of punctuation and special tokens alone, or at least half of it is one thing repeated.

    That is one run of words, four times or more in a row (a single word: five), or one run of characters, five times
    or more and at least 12 long ("aaaaaaaaaaaa", "hahahahahaha"); punctuation, case and spaces do not count.
    """
    marked = SPECIAL.sub(f" {MARK} ", text).casefold()
    if all(character == MARK or _empty(character) for character in marked):
        return True
    plain = "".join(c if _part_of_word(c) else " " for c in re.sub(r"(?<=\d)[.,](?=\d)", "", marked))
    return _loops_in_words(plain.split()) or _loops_in_characters([c for c in marked if not _empty(c)])


def _empty(character: str) -> bool:
    """Spaces, punctuation, signs, and what stands for bytes that are no text; emoji are none of these."""
    kind = unicodedata.category(character)
    return character != MARK and (kind[0] in "ZPC" or kind in ("Sm", "Sc", "Sk") or character == "\ufffd")


def _part_of_word(character: str) -> bool:
    return character == MARK or unicodedata.category(character)[0] in "LMN"


def _loops_in_words(words: list[str]) -> bool:
    """Whether half of the words are one run of them, over and over."""
    longest = min(len(words) // TIMES, LONGEST_WORDS)
    return any(_longest(words, n)[0] >= max(TIMES * n, TIMES + 1, len(words) / 2) for n in range(1, longest + 1))


def _loops_in_characters(characters: list[str]) -> bool:
    """Whether half of the characters are one run of them, over and over."""
    for n in range(1, min(len(characters) // CHARACTERS, LONGEST_CHARACTERS) + 1):
        length, end = _longest(characters, n)
        run = characters[end - length : end]
        width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in run)
        enough = DIGITS if all(c.isdigit() for c in run) else WIDTH
        if length >= max(CHARACTERS * n, len(characters) / 2) and width >= enough:
            return True
    return False


def _longest(parts: list[str], n: int) -> tuple[int, int]:
    """How long the longest stretch is that repeats its first `n` parts, and where it ends; 0 where nothing does."""
    same, best = 0, (0, 0)  # how many parts in a row equal the part n places before
    for at in range(n, len(parts)):
        same = same + 1 if parts[at] == parts[at - n] else 0
        if same and same + n > best[0]:
            best = (same + n, at + 1)
    return best
