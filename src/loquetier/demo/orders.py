"""The task that the demo trains live: an order said in a sentence becomes one line of JSON. No torch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

SYSTEM: Final = "Write the order as JSON with item, qty and size."
ITEMS: Final = (
    "latte", "espresso", "tea", "cocoa", "juice", "lemonade", "bagel", "muffin", "salad", "soup", "pizza", "burger",
)  # fmt: skip
SIZES: Final = ("small", "medium", "large")
_NUMBERS: Final = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_SENTENCES: Final = (
    "Hi, can I get {n} {size} {item}, please?",
    "{N} {size} {item} to go.",
    "I would like {n} {item}, {size}.",
    "Could we have {n} {size} {item} for the table?",
    "My friend wants {n} {item}, make it {size}.",
    "Please bring me {n} {item} in {size}. Thanks!",
    "Hello! {N} {item}, {size} size, and the bill.",
    "We are hungry: {n} {size} {item}.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What is ordered."""

    item: str
    qty: int
    size: str

    def to_json(self) -> str:
        """The line the adapter shall learn to write."""
        return json.dumps({"item": self.item, "qty": self.qty, "size": self.size}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class OrderExample:
    """An order and how somebody says it."""

    order: Order
    sentence: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Chat messages that ask for the JSON."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.sentence}]

    @property
    def record(self) -> dict[str, Any]:
        """The training record: the prompt and the right answer."""
        return {"messages": [*self.prompt, {"role": "assistant", "content": self.order.to_json()}]}

    def is_answered_by(self, text: str) -> bool:
        """Whether `text` is the order and nothing else, spaces inside the JSON aside."""
        try:
            return bool(json.loads(text) == json.loads(self.order.to_json()))
        except ValueError:
            return False


def make_orders(num_train: int, num_held_out: int, seed: int = 0) -> tuple[list[OrderExample], list[OrderExample]]:
    """Examples to train on and examples to measure with; every (item, qty, size) is in at most one of the two. Pure.

    Raises:
        ValueError: more examples are asked for than there are combinations.
    """
    combinations = [Order(item, qty, size) for item, qty, size in product(ITEMS, _NUMBERS, SIZES)]
    if num_train + num_held_out > len(combinations):
        raise ValueError(f"{num_train} + {num_held_out} examples asked for; there are {len(combinations)} combinations")
    rng = random.Random(f"orders-{seed}")
    rng.shuffle(combinations)
    examples = [_say(order, rng) for order in combinations[: num_train + num_held_out]]
    return examples[:num_train], examples[num_train:]


def exact_match(examples: Iterable[OrderExample], answers: Iterable[str]) -> float:
    """Part of the examples whose answer is right in every field."""
    right = [example.is_answered_by(answer) for example, answer in zip(examples, answers, strict=True)]
    return sum(right) / len(right)


def _say(order: Order, rng: random.Random) -> OrderExample:
    number = _NUMBERS[order.qty] if rng.random() < 0.7 else str(order.qty)
    plural = order.item if order.qty == 1 else f"{order.item}s"
    sentence = rng.choice(_SENTENCES).format(n=number, N=number.capitalize(), size=order.size, item=plural)
    return OrderExample(order, sentence)
