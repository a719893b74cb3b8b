"""Tokens and labels of a conversation, through the model's chat template.

The conversation is rendered up to each answer (with the prompt of an answer) and through it. Both texts must be
beginnings of the whole text: then what lies between them is what a request for this answer would have to generate. An
answer's labels are its text and the template's end marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loquetier.errors import DataError
from loquetier.training.chat import ChatRenderer, chat_renderer, render_text, special_text
from loquetier.training.messages import Chat, Place


def encode_chat(chat: Chat, tokenizer: Any, max_len: int, number: int) -> tuple[list[int], list[bool], int]:
    """Tokens, whether each is a label, and their number. What comes after the last answer is dropped.

    Labels behind `max_len` tokens may be missing: they will be cut off.

    Raises:
        DataError: no chat template, or one that changes earlier text or does not show calls.
        ConfigError: the template's own refusal.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"Example {number}: chat messages, but the base's tokenizer has no chat template; use 'text', or 'prompt' "
            "and 'completion'"
        )
    _check_calls_are_shown(chat, tokenizer, number)
    # What follows the last answer would cost rows and teach nothing.
    last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    messages = chat.messages[: last + 1]
    renderer = chat_renderer(tokenizer, messages, chat.tools)
    split = _Split(renderer, renderer.text(messages, False))
    spans = _label_spans(chat, messages, renderer, split, max_len, number)
    tokens = split.tokens
    learn = [False] * len(tokens)
    for start, end in spans:
        end = _answer_end(tokenizer, tokens, start, end)
        learn[start:end] = [True] * (end - start)
    return tokens, learn, len(tokens)


def _label_spans(
    chat: Chat,
    messages: Sequence[Mapping[str, Any]],
    renderer: ChatRenderer,
    split: _Split,
    max_len: int,
    number: int,
) -> list[tuple[int, int]]:
    """First and behind the last token of each answer that is learned, as far as `max_len` reaches."""
    spans: list[tuple[int, int]] = []
    whole, last = split.text, len(messages) - 1
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        at = Place(number, i + 1)
        if i == 0:  # no request has an empty prompt, and templates need not render one
            if chat.learn[i]:
                raise at.error(
                    "an answer to nothing cannot be learned; put a user or system message before it, or give it "
                    '"weight": 0'
                )
            continue
        before = renderer.text(messages[:i], True)
        after = whole if i == last else renderer.text(messages[: i + 1], False)
        if not after.startswith(before) or not whole.startswith(after):
            raise at.error(
                "the chat template is not prefix-stable (rendering one more message changes earlier text), so labels "
                "cannot be placed; use 'prompt' and 'completion'"
            )
        start = split.tokens_before(len(before), at)
        end = split.tokens_before(len(after), at)
        if chat.learn[i]:
            spans.append((start, end))
        if end >= max_len:
            break  # each answer costs two renders of all that is before it
    return spans


class _Split:
    """The token ids of a text, with borders that no token straddles.

    The ids are the plain tokenization's, unless a token straddles a border: an answer that begins with a line break
    behind a template's own would share a token with it. There the text is tokenized in two parts, since a request
    brings the first part alone and the model has to generate the second. Borders must come in order.
    """

    def __init__(self, renderer: ChatRenderer, text: str) -> None:
        self._renderer, self.text = renderer, text
        self._start = 0
        self._head: list[int] = []
        """Ids before `_start`, which no later border changes."""
        self._tail = renderer.ids(text)

    @property
    def tokens(self) -> list[int]:
        """All ids."""
        return self._head + self._tail

    def tokens_before(self, border: int, at: Place) -> int:
        """How many ids lie before the character `border`. Raises DataError where the text cannot be split."""
        if border == len(self.text):
            return len(self.tokens)
        before = self._renderer.ids(self.text[self._start : border])
        if self._tail[: len(before)] != before:
            rest = self._renderer.ids(self.text[border:])
            decode = self._renderer.tokenizer.decode
            if decode(before + rest) != decode(self._tail):
                raise at.error(
                    "the chat template is not prefix-stable with this tokenizer (a token lies across the answer's "
                    "border, and the parts do not add up to the whole); use 'prompt' and 'completion'"
                )
            self._head += before
            self._start, self._tail = border, rest
            return len(self._head)
        return len(self._head) + len(before)


def _answer_end(tokenizer: Any, tokens: list[int], start: int, end: int) -> int:
    """Where the labels of the answer ``tokens[start:end]`` end: after its end marker.

    Some templates put a line break behind the marker. Generation stops at the marker, so that nothing would ever
    produce the break: learning it is wasted.
    """
    special = special_text(tokenizer).ids
    marker = next((at for at in range(end - 1, start - 1, -1) if tokens[at] in special), None)
    if marker is None or tokenizer.decode(tokens[marker + 1 : end]).strip():
        return end
    return marker + 1


def _check_calls_are_shown(chat: Chat, tokenizer: Any, number: int) -> None:
    if not chat.has_tool_calls:
        return
    bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat.messages]
    shown = render_text(tokenizer, list(chat.messages), False, chat.tools)
    if shown == render_text(tokenizer, bare, False, chat.tools):
        raise DataError(
            f"Example {number} has tool_calls, but the base's chat template does not show them: the model would learn "
            "an empty answer; write the call into 'content'"
        )


def tools_are_shown(chat: Chat, tokenizer: Any) -> bool:
    """Whether the chat template makes anything of the tools of `chat`."""
    messages = list(chat.messages)
    return render_text(tokenizer, messages, False, chat.tools) != render_text(tokenizer, messages, False)
