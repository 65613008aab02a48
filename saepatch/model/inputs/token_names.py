"""Names of tokens for display: in cards, rows, axes and messages."""

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"  # SentencePiece's space (Kudo and Richardson, 2018)
_END = "</w>"  # end of a word in the BPE of Sennrich et al. (2016)


def token_name(tokenizer: Any, token: int) -> str:
    """A token's text as it appears mid-sentence, so that ` she` and `she` differ in every vocabulary.

    A byte token of a vocabulary with byte fallback is shown as ⟨0A⟩ even where it is a character by itself, since such
    vocabularies have another token for that character. A token that is part of a character shows its bytes, as in
    ⟨E2 80⟩; a token without text, its piece; an id without a token, ⟨id 5000⟩.
    """
    try:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, OverflowError, TypeError):  # an unembedding may have more rows than its tokenizer has tokens
        return f"⟨id {token}⟩"
    if piece is None:
        return f"⟨id {token}⟩"
    if isinstance(piece, bytes):
        piece = piece.decode("latin-1")
    if (byte := _BYTE.fullmatch(piece)) and text != piece:
        return f"⟨{byte[1]}⟩"
    if "\ufffd" in text and text != piece:
        signs = _byte_signs()
        return "⟨" + " ".join(f"{signs[sign]:02X}" for sign in piece) + "⟩" if set(piece) <= set(signs) else str(piece)
    if spaces := len(piece) - len(piece.lstrip(_SPACE)):  # a decoder drops the space that a text begins with
        return text if text.startswith(_SPACE) else " " * spaces + text.lstrip(" ")
    if piece.endswith(_END) and not text.endswith(_END):
        return text.rstrip(" ") + " "
    return text or str(piece)


@cache
def _byte_signs() -> dict[str, int]:
    """The characters by which byte-level BPE (Radford et al., 2019) represents bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}
