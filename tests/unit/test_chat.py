"""Typed special tokens stay text with every kind of tokenizer, also where a text's ids depend on what is before it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from loquetier.training.chat import render_chat, render_text, special_text

SPECIALS = ("<unk>", "<s>", "</s>")
PIECES = (*SPECIALS, "▁", *map(chr, range(33, 127)), "</", "s>", "▁a", "<s")
# As converted vocabularies have them: two of these merges end in a special token.
MERGES = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "a"), ("<", "s"), ("<s", ">")]


def build(kind: str) -> Any:
    """SentencePiece-like tokenizers: a space belongs to the next word, and the first word may get one."""
    if kind == "unigram":
        inner = Tokenizer(models.Unigram([(piece, -float(i) if i > 2 else 0.0) for i, piece in enumerate(PIECES)], 0))
    else:
        vocab = {piece: i for i, piece in enumerate(PIECES)}
        inner = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>"))
    if kind == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
    return tokenizer


TOKENIZERS = {kind: build(kind) for kind in ("metaspace", "normalizer", "unigram")}
words = st.text("ab <>/s", max_size=8)
typed = st.lists(words | st.sampled_from(SPECIALS), max_size=5).map("".join)


def as_messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(typed, min_size=1, max_size=3))
def test_control_tokens_come_from_the_template_only(kind: str, texts: list[str]) -> None:
    ids = render_chat(TOKENIZERS[kind], as_messages(texts), add_generation_prompt=False)
    assert [ids.count(token) for token in (0, 1, 2)] == [0, len(texts), len(texts)]
    # Between the control tokens lies what was typed; "▁" is a space, or the one that a first word is given.
    text = "".join("\x01\x02"[token - 1] if token in (1, 2) else PIECES[token] for token in ids).replace("▁", " ")
    sections = [section.removeprefix("\x01") for section in text.split("\x02")[:-1]]
    assert [section.lstrip(" ") for section in sections] == [text.lstrip(" ") for text in texts]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(words, min_size=1, max_size=3))
def test_the_guarded_way_equals_the_plain_one(kind: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    guard = special_text(tokenizer)
    rendered = render_text(tokenizer, as_messages(texts), False)
    plain = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if not guard.occurs_in(texts):
        assert (
            guard.encode(rendered) == plain == render_chat(tokenizer, as_messages(texts), add_generation_prompt=False)
        )
