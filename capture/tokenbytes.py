"""The exact bytes of a tokenizer's tokens, so that text can be read from ids without the tokenizer."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenBytes", "token_bytes"]


def token_bytes(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> dict[int, bytes]:
    """Return the bytes of each token id.

    The bytes of a text's tokens, end to end, are the text in UTF-8 (with the space that a sentencepiece tokenizer puts
    in front of it). Ids without a token, such as padding rows of the embedding, have no bytes.

    Parameters
    ----------
    tokenizer : of transformers
        Byte-level BPE, sentencepiece with byte fallback, or a Python tokenizer with either's pieces.
    ids : token ids

    Returns
    -------
    dict of id to bytes, ascending
    """
    wanted = sorted({int(one) for one in ids})
    return dict(zip(wanted, TokenBytes(tokenizer).of(wanted), strict=True))


class TokenBytes:
    """Token bytes of one tokenizer, each id decoded once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer: Any = tokenizer
        self._known: dict[int, bytes] = {}
        self._added = {int(key): token for key, token in self._tokenizer.added_tokens_decoder.items()}
        self._piece = _piece_decoder(tokenizer)

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token of a sequence."""
        for one in set(ids) - self._known.keys():
            self._known[one] = self._decode(one)
        return [self._known[one] for one in ids]

    def _decode(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        # Special tokens stand for themselves; an added word of a sentencepiece vocabulary may still spell spaces "▁".
        if added is not None and (added.special or self._piece is _byte_level):
            return str(added.content).encode()
        if self._piece is None:
            return str(self._tokenizer.decode([token_id])).encode()
        piece = self._tokenizer.convert_ids_to_tokens([token_id])[0]
        if piece is None:
            return b""
        return piece if isinstance(piece, bytes) else self._piece(piece)


def _piece_decoder(tokenizer: Any) -> Callable[[str], bytes] | None:
    """Tell how a vocabulary spells bytes; None when neither way is known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        kinds = _types(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else set()
        if "ByteLevel" in kinds:
            return _byte_level
        return _sentencepiece if kinds & {"ByteFallback", "Metaspace", "Replace"} else None
    if hasattr(tokenizer, "byte_decoder") or hasattr(tokenizer, "byte_encoder"):
        return _byte_level
    return _sentencepiece if hasattr(tokenizer, "sp_model") else None


def _types(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {str(node.get("type"))}.union(*(_types(value) for value in node.values()))
    return set().union(*(_types(value) for value in node)) if isinstance(node, list) else set()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest for 256 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level(piece: str) -> bytes:
    if all(character in _BYTE_OF_CHARACTER for character in piece):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    return piece.encode()
