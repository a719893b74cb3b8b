"""Errors in the words of the command that was run: its options, not the fields of our classes or of an HTTP body."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from typer.core import TyperCommand, TyperGroup, TyperOption

Command = TyperCommand | TyperGroup
_ALIASES: Final[Mapping[str, str]] = {"load_inplace": "replace"}
"""Fields of HTTP bodies that a command's option is called differently for."""
_PHRASES: Final[Mapping[str, tuple[str, str]]] = {"replace": ("set 'load_inplace' to True", "give --replace")}
"""vLLM's own sentences, by the option that they are about."""
_SHORT: Final = frozenset({"r"})
"""Fields whose name is no word of English, so that they are meant where they stand alone."""
_QUOTED: Final = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)"""
"""As `repr` writes it; an apostrophe inside a word is none of it."""
_CLASS: Final = r"(?:EngineConfig|TrainingConfig|LoraSpec|SamplingParams|training|lora)\."
_VALUE: Final = rf"{_QUOTED}|[^\s,;:)\]]+"
_WORD: Final = re.compile(
    rf"{_QUOTED}|(?<![\w./@-])(?:{_CLASS})?(?P<name>[a-z]\w*)\b(?:(?P<equals>=)(?P<value>{_VALUE})?)?"
)


def command_of(root: object, argv: Sequence[str]) -> Command:
    """The command below `root` that a command line means, as far down as it names one."""
    assert isinstance(root, Command)
    command = root
    for word in argv:
        below = command.commands.get(word) if isinstance(command, TyperGroup) else None
        if not isinstance(below, Command):
            break
        command = below
    return command


def in_words_of(command: Command, message: str) -> str:
    """`message` with options of `command` in place of the fields that they set; what is quoted stays as it is.

    ``r=0`` becomes ``--r 0``, ``overwrite=True`` becomes ``--overwrite``. Names without ``=`` are taken for fields only
    if they could be no word of English.
    """
    options = {p.name: p for p in command.params if isinstance(p, TyperOption) and p.name is not None}

    def spoken(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        option = options.get(_ALIASES.get(name, name)) if name else None
        if option is None or not (found["equals"] or "_" in name or name in _SHORT):
            return found[0]
        on = next((o for o in option.opts if o.startswith("--")), option.opts[0])
        if value in ("True", "true"):
            return on
        if value in ("False", "false"):
            return option.secondary_opts[0] if option.secondary_opts else f"no {on}"
        return on if value is None else f"{on} {value}"

    for name, (phrase, ours) in _PHRASES.items():
        message = message.replace(phrase, ours) if name in options else message
    return _WORD.sub(spoken, message)
