"""Conversations to token ids through the model's own chat template.

What people type never becomes a control token. A template returns text, so a user's "<|im_end|>" would be tokenized
like the template's own. Where such text occurs, each occurrence is replaced by an unguessable mask before rendering;
the rendered text is then tokenized by a copy of the tokenizer whose special tokens have unguessable spellings (same
ids, same rules), with the template's tokens respelled and the masks replaced by what was typed. One pass over the
whole text, so that neighbours merge as in any plain text. Without such text the ids are the plain tokenization's.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from loquetier.errors import ConfigError


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation; "weight" in a message is not shown to the template.

    Text that spells a special token (one that the tokenizer flags as special; "<think>" usually is not) is encoded as
    text wherever it comes from `messages` or `tools`.

    Raises:
        ConfigError: the template refuses the messages, or text that cannot be encoded.
    """
    renderer = chat_renderer(tokenizer, messages, tools)
    return renderer.ids(renderer.text(messages, add_generation_prompt))


@dataclass(frozen=True)
class ChatRenderer:
    """Renders a conversation and its beginnings to texts that can be compared and cut, and those to token ids."""

    tokenizer: Any
    guard: SpecialText | None
    """Set if the conversation spells a special token: texts then hold masks."""
    tools: Any

    def text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The template's text. Raises ConfigError with the template's own reason."""
        shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        if self.guard is None:
            return render_text(self.tokenizer, shown, add_generation_prompt, self.tools)
        tools = self.guard.mask(self.tools)
        return render_text(self.tokenizer, self.guard.mask(shown), add_generation_prompt, tools)

    def ids(self, text: str) -> list[int]:
        """Token ids of what `text` returned, or of a part. Raises ConfigError for a lone surrogate."""
        if self.guard is None:
            return tokenize(self.tokenizer, text, add_special_tokens=False)
        return self.guard.encode(text)


def chat_renderer(tokenizer: Any, messages: Any, tools: Any = None) -> ChatRenderer:
    """A renderer for `messages` and what begins like them; guarded only where a special token is spelled."""
    guard = special_text(tokenizer)
    return ChatRenderer(tokenizer, guard if guard.occurs_in((messages, tools)) else None, tools)


def render_text(tokenizer: Any, messages: Any, add_generation_prompt: bool, tools: Any = None) -> str:
    """The template's text. Raises ConfigError with the template's own reason."""
    given = {} if tools is None else {"tools": tools}
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **given
        )
    # A template is a program: what it raises on input that it was not written for is any of these.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"the chat template cannot render these messages ({type(error).__name__}: {error})"
        ) from error
    return str(text)


def tokenize(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text in which special tokens are parsed. Raises ConfigError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}), which no UTF-8 text can have; remove it"
        ) from error
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


@dataclass(frozen=True)
class SpecialText:
    """The spellings of a tokenizer's special tokens, and how to write them as plain text."""

    tokenizer: Any
    spellings: tuple[str, ...]
    """Longest first: at one place the longest match counts, as in the tokenizer."""
    nonce: str
    """Makes masks unguessable, so that no message can spell one."""

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(int(self.tokenizer.convert_tokens_to_ids(spelling)) for spelling in self.spellings)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.spellings)) or r"(?!)")

    @cached_property
    def _number(self) -> dict[str, int]:
        return {spelling: number for number, spelling in enumerate(self.spellings)}

    @cached_property
    def _backend(self) -> Tokenizer:
        return _respelled(
            {spelling: self._wrap("t", number) for spelling, number in self._number.items()}, self.tokenizer
        )

    def _wrap(self, kind: str, number: int) -> str:
        # Private-use characters: no template trims, no normalizer changes, no tokenizer merges them with a neighbour's.
        return f"\U0010fff0{self.nonce}{kind}{number}\U0010fff1"

    def occurs_in(self, value: Any) -> bool:
        """Whether any string in nested lists and dictionaries, keys too, spells a special token."""
        search = self._pattern.search
        return any(search(text) is not None for text in _strings(value))

    def mask(self, value: Any) -> Any:
        """The same structure with a mask for each such spelling."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._wrap("m", self._number[match[0]]), value)
        if isinstance(value, Mapping):
            return {self.mask(key): self.mask(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask(item) for item in value]
        return value

    def encode(self, masked: str) -> list[int]:
        """Token ids of a rendered text: masks as the text they stand for, all other spellings as special tokens."""
        text = self._pattern.sub(lambda match: self._wrap("t", self._number[match[0]]), masked)
        masks = re.compile(f"\U0010fff0{self.nonce}m([0-9]+)\U0010fff1")
        text = masks.sub(lambda match: self.spellings[int(match[1])], text)
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise ConfigError("the messages have a lone surrogate, which no UTF-8 text can have; remove it") from error


def special_text(tokenizer: Any) -> SpecialText:
    """The special tokens of `tokenizer`, looked up once per tokenizer."""
    return _special_text(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _special_text(tokenizer: Any, size: int) -> SpecialText:
    """`size` is in the key because adding a token changes the answer."""
    del size
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    return SpecialText(tokenizer, tuple(sorted(found, key=lambda text: (-len(text), text))), secrets.token_hex(8))


def _strings(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)


def _respelled(names: Mapping[str, str], tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer in which each special token has a new spelling and its old id."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the messages spell a special token, and this tokenizer ({type(tokenizer).__name__}) has no form that can "
            "encode it as plain text; remove it from the messages"
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:  # Unigram: a list of (piece, score)
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("merges"):
        # Converted vocabularies have merges that end in a special token: plain text must not reach it that way.
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    spec.update(truncation=None, padding=None, post_processor=None)
    return Tokenizer.from_str(json.dumps(spec))


def template_fingerprint(tokenizer: Any) -> str:
    """``sha256:...`` of all that turns a conversation into token ids: the chat template and the tokenizer.

    An adapter trained under one fingerprint and served under another sees prompts that it was not trained on.
    """
    backend: Any = sorted(tokenizer.get_vocab().items())
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by calls, not by the model: they differ between two uses of the same tokenizer.
        backend.update(truncation=None, padding=None)
    added = {str(number): [t.content, t.special] for number, t in tokenizer.added_tokens_decoder.items()}
    parts = {"template": tokenizer.chat_template, "tokenizer": backend, "added": added, "eos": tokenizer.eos_token_id}
    return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
