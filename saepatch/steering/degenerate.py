"""Detection of degenerate text: empty, only punctuation or special tokens, or repetitive."""

import re
import unicodedata

TIMES = 4  # repetitions of words that count as a loop; of a single word one more: "no, no, no, no" is fine
CHARACTERS = 5  # repetitions of characters, at least WIDTH wide: "hahahaha" and "nooooo" are fine
WIDTH = 12  # wide characters, such as ideographs, count 2
LONGEST_WORDS, LONGEST_CHARACTERS = 64, 24  # longest sequences tested; the cost grows with them
DIGITS = 30  # minimum for digits: 0.3333333333 and 1000000000000 are numbers

SPECIAL = re.compile(  # special tokens written out as text
    r"</?(?:unk|s|pad|bos|eos|mask|cls|sep|eot|endoftext|start_of_turn|end_of_turn|unused\d+|extra_id_\d+|0x[0-9a-f]{2})>"
    r"|<[|｜][^<>|｜]{1,40}[|｜]>|\[(?:pad|unk|cls|sep|mask|/?inst)\]",
    re.IGNORECASE,
)
MARK = "\ue000"  # replaces a special token, as a separate word


def is_degenerate(text: str) -> bool:
    """Whether text is empty, only punctuation and special tokens, or at least half of it is one repeated sequence.

    That is a sequence of words repeated at least four times in a row (a single word: five), or a sequence of characters
    repeated at least five times and at least 12 wide ("aaaaaaaaaaaa", "hahahahahaha"); punctuation, case and spaces are
    ignored.
    """
    marked = SPECIAL.sub(f" {MARK} ", text).casefold()
    if all(character == MARK or _empty(character) for character in marked):
        return True
    plain = "".join(c if _part_of_word(c) else " " for c in re.sub(r"(?<=\d)[.,](?=\d)", "", marked))
    return _loops_in_words(plain.split()) or _loops_in_characters([c for c in marked if not _empty(c)])


def _empty(character: str) -> bool:
    """Whether a character is a space, punctuation, a symbol or an undecodable byte; emoji are not."""
    kind = unicodedata.category(character)
    return character != MARK and (kind[0] in "ZPC" or kind in ("Sm", "Sc", "Sk") or character == "\ufffd")


def _part_of_word(character: str) -> bool:
    return character == MARK or unicodedata.category(character)[0] in "LMN"


def _loops_in_words(words: list[str]) -> bool:
    """Whether at least half of the words are one repeated sequence."""
    longest = min(len(words) // TIMES, LONGEST_WORDS)
    return any(_longest(words, n)[0] >= max(TIMES * n, TIMES + 1, len(words) / 2) for n in range(1, longest + 1))


def _loops_in_characters(characters: list[str]) -> bool:
    """Whether at least half of the characters are one repeated sequence."""
    for n in range(1, min(len(characters) // CHARACTERS, LONGEST_CHARACTERS) + 1):
        length, end = _longest(characters, n)
        run = characters[end - length : end]
        width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in run)
        enough = DIGITS if all(c.isdigit() for c in run) else WIDTH
        if length >= max(CHARACTERS * n, len(characters) / 2) and width >= enough:
            return True
    return False


def _longest(parts: list[str], n: int) -> tuple[int, int]:
    """Length and end of the longest stretch that repeats its first `n` parts; 0 where there is none."""
    same, best = 0, (0, 0)  # number of consecutive parts equal to the part n earlier
    for index in range(n, len(parts)):
        same = same + 1 if parts[index] == parts[index - n] else 0
        if same and same + n > best[0]:
            best = (same + n, index + 1)
    return best
