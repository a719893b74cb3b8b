"""Text of a growing token list, piece by piece: the joined pieces are exactly the text of the whole list.

`tokenizers.DecodeStream` is not used: it cannot be flushed, decodes a window that grows with every token while the text
ends in invalid UTF-8 (a client can force that with a logit bias), and is not exact for SentencePiece byte tokens, whose
whole run turns into U+FFFD when a later byte makes it invalid.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import decoders

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROMPT_CONTEXT = 8
"""Prompt tokens decoded in front of the answer: enough for the one-token rules about leading spaces."""
_MAX_HELD = 16
"""Tokens held for an incomplete character outside byte runs; one takes at most 4, so more is real U+FFFD."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text of the tokens."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The vocabulary's entry."""


class IncrementalDetokenizer:
    """The text of one choice. Not thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_tokens: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """Start an empty text.

        Args:
            tokenizer: a transformers tokenizer (fast or slow).
            prompt_tokens: context for tokenizers that drop the first token's leading space; without it the text is
                ``tokenizer.decode(generated)``, with it ``decode(prompt end + generated)`` less ``decode(prompt end)``.
                Byte-level tokenizers have no such rule and do not look at it.
            skip_special_tokens: leave special tokens out of the text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pieces: list[str] = []
        self._strategy: _ByteLevel | _Window
        if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
            self._strategy = _ByteLevel(backend, skip_special_tokens)
        else:
            self._strategy = _Window(tokenizer, prompt_tokens, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become final; "" while a character is incomplete."""
        return self._emit(self._strategy.push(token_id))

    def flush(self) -> str:
        """Return what is still held back, incomplete bytes as U+FFFD. Call it once, at the end."""
        return self._emit(self._strategy.flush())

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def _emit(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that one token stands for, special tokens spelled out; b"" for an id without a token.

    Exact for byte-level tokenizers and for byte tokens; of others the vocabulary's entry, its word mark as a space.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        return _raw(backend, token_id, False)
    piece = tokenizer.convert_ids_to_tokens(token_id) or ""
    if _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return str(piece).replace("\u2581", " ").encode()


class _ByteLevel:
    """Byte-level BPE: each token is a byte string, so the text is one incremental UTF-8 decoding."""

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        # Python's "replace" and Rust's lossy decoding both give one U+FFFD per maximal subpart (Unicode 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(_raw(self._backend, token_id, self._skip_special_tokens))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@lru_cache(maxsize=1 << 16)  # 16 tokens a step, 9 us each: 1 % of a step on a CPU
def _raw(backend: Any, token_id: int, skip_special_tokens: bool) -> bytes:
    """A byte-level token's bytes, which alone may be no UTF-8."""
    token = backend.id_to_token(token_id)
    if not token:
        return b""
    # Alone, only a skipped special token decodes to nothing.
    if skip_special_tokens and not backend.decode([token_id], skip_special_tokens=True):
        return b""
    values = [_BYTE_OF.get(char) for char in token]
    # An added token may hold characters outside the alphabet; the decoder then takes all of it as plain text.
    return token.encode() if None in values else bytes(v for v in values if v is not None)


def _common_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Window:
    """Any other tokenizer: decode a short window with and without the new tokens; the difference is the new text.

    The window begins at the piece emitted before, which carries the context that decoders look at (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_tokens[-_PROMPT_CONTEXT:])
        self._read = len(self._ids)
        """Tokens of the window whose text is out."""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        # A run of byte tokens is decided only by its end: one invalid byte turns all of it into U+FFFD. A token without
        # text of its own (a skipped special token) does not end the run.
        is_byte = _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        if is_byte or not self._decode([token_id]):
            return ""
        whole = self._decode(self._ids)
        if whole.endswith("\ufffd") and len(self._ids) - self._read < _MAX_HELD:
            return ""
        return self._take(whole)

    def flush(self) -> str:
        return self._take(self._decode(self._ids))

    def _take(self, whole: str) -> str:
        before = self._decode(self._ids[: self._read])
        # They differ before their end only when the prompt ended inside a character that the answer completed.
        piece = whole[_common_length(before, whole) :]
        if piece:  # else the window would begin with tokens that carry no context
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
