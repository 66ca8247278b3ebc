"""The demo's data, made by rule from phrases.yaml: the task, and the text its base model has read.

    python examples/demo/make_data.py                 triage.jsonl: customers' messages and how the desk files them
    python examples/demo/make_data.py --pairs         preferences.jsonl: other messages, each filed right and filed wrong
    python examples/demo/make_data.py --corpus FILE   the pretraining corpus: tickets with index cards, lists, glossaries

The corpus holds the shop's world: what customers say in both languages, the card an agent writes of it, other records. It
holds no chat turns, no answer in the form the task asks for, and no message of the task. So the base knows what there is to
know and answers nothing right; what training adds is the task. All files depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
PHRASES: dict[str, Any] = YAML(typ="safe").load(HERE / "phrases.yaml")
SYSTEM = "File the customer's message as JSON."
PAIRS = 400
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A message, and what it is about."""

    language: str
    message: str
    item: str
    """The product in the customer's words."""
    team: str
    product: str
    order: str
    urgent: bool

    @property
    def answer(self) -> str:
        filed = {"team": self.team, "product": self.product, "urgent": self.urgent}
        return json.dumps(filed, separators=(",", ":"))


def digits(rng: random.Random, count: int) -> str:
    return str(rng.randrange(1, 10)) + "".join(str(rng.randrange(10)) for _ in range(count - 1))


def distractor(rng: random.Random, sentence: str, language: str) -> str:
    """The sentence with a number that is not the order's."""
    month, day = rng.randrange(12), rng.randrange(1, 29)
    values = {
        "day": f"{day} {MONTHS[month]}" if language == "en" else f"{month + 1}月{day}日",
        "money": f"${rng.randrange(9, 400)}.{rng.randrange(10)}0"
        if language == "en"
        else f"{rng.randrange(30, 3000)}元",
        "phone": f"0{digits(rng, 3)} {digits(rng, 6)}",
        "model": f"{rng.choice('ABKMTX')}{digits(rng, 3)}",
        "customer": digits(rng, 6),
    }
    return sentence.format(**values)


def worn(rng: random.Random, text: str) -> str:
    """The text as people type it: all small, all capitals, a stop left out."""
    roll = rng.random()
    if roll < 0.2:
        text = text.lower()
    elif roll < 0.23:
        text = text.upper()
    return text.rstrip(".。") if rng.random() < 0.25 else text


def core(rng: random.Random, language: str, team: str, item: str, order: str) -> list[str]:
    """What the customer wants, and the order's number: in one sentence or two."""
    space, stop = (" ", ".") if language == "en" else ("", "。")
    point = str(rng.choice(PHRASES["teams"][team][language])).format(item=item)
    point = point[0].upper() + point[1:]
    if rng.random() < 0.5:
        inline = rng.choice(PHRASES["order"][language]["inline"]).format(order=order)
        return [point + (space if inline[0] == "(" else "") + inline + stop]
    own = rng.choice(PHRASES["order"][language]["own"]).format(order=order)
    return [point + stop, own] if rng.random() < 0.5 else [own, point + stop]


def around(rng: random.Random, language: str, sentences: list[str]) -> list[str]:
    """The sentences among others that are beside the point."""
    sentences = list(sentences)
    for sentence in rng.sample(PHRASES["distractor"][language], rng.choice((0, 0, 1, 1, 2))):
        sentences.insert(rng.randrange(len(sentences) + 1), distractor(rng, sentence, language))
    if rng.random() < 0.35:
        sentences.insert(0, rng.choice(PHRASES["opening"][language]))
    if rng.random() < 0.3:
        sentences.append(rng.choice(PHRASES["closing"][language]))
    return sentences


def ticket(rng: random.Random, *, plain: bool = False) -> Ticket:
    """A ticket; a plain one says nothing beside the point."""
    language = rng.choice(("en", "zh"))
    team = rng.choice(list(PHRASES["teams"]))
    product = rng.choice(list(PHRASES["products"]))
    item = rng.choice(PHRASES["products"][product][language])
    order = digits(rng, 4)
    urgent = rng.random() < 0.4
    sentences = core(rng, language, team, item, order)
    if urgent or rng.random() < 0.4:
        pace = rng.choice(PHRASES["urgent" if urgent else "calm"][language])
        sentences.insert(rng.randrange(len(sentences) + 1), pace)
    if not plain:
        sentences = around(rng, language, sentences)
    message = worn(rng, (" " if language == "en" else "").join(sentences))
    return Ticket(language, message, item, team, product, order, urgent)


def tickets(seed: int) -> Iterator[Ticket]:
    """Tickets without end, no message twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        made = ticket(rng)
        if made.message not in seen:
            seen.add(made.message)
            yield made


def row(made: Ticket) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": made.message},
            {"role": "assistant", "content": made.answer},
        ]
    }


def pair(rng: random.Random, made: Ticket) -> dict[str, Any]:
    """The right answer, and one with the wrong team, the wrong product or the wrong haste."""
    wrong = rng.choice(("team", "product", "urgent"))
    value: Any = not made.urgent
    if wrong != "urgent":
        value = rng.choice([other for other in PHRASES[f"{wrong}s"] if other != getattr(made, wrong)])
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": made.message}],
        "chosen": made.answer,
        "rejected": replace(made, **{wrong: value}).answer,
    }


def pairs(seed: int, rows: int, barred: set[str]) -> Iterator[dict[str, Any]]:
    """Pairs whose messages are not in `barred`."""
    rng = random.Random(seed)
    source = (made for made in tickets(seed) if made.message not in barred)
    return (pair(rng, made) for made in islice(source, rows))


def reply(rng: random.Random, made: Ticket, language: str) -> str:
    pace = "urgent" if made.urgent else "calm"
    item = made.item if language == made.language else rng.choice(PHRASES["products"][made.product][language])
    return str(rng.choice(PHRASES["reply"][language])).format(
        item=item,
        order=made.order,
        team=rng.choice(PHRASES["teams"][made.team]["names"][language]),
        haste=rng.choice(PHRASES["haste"][pace][language]),
    )


def note(rng: random.Random, made: Ticket) -> str:
    pace = "urgent" if made.urgent else "normal"
    return str(rng.choice(PHRASES["note"])).format(desk=made.team, product=made.product, order=made.order, pace=pace)


def card(rng: random.Random, made: Ticket) -> str:
    """The ticket's index card: its fields in any order, in one of two plain layouts."""
    fields = [
        ("team", made.team),
        ("product", made.product),
        ("order", made.order),
        ("urgent", "yes" if made.urgent else "no"),
    ]
    rng.shuffle(fields)
    if rng.random() < 0.5:
        return "\n".join(f"{name}: {value}" for name, value in fields)
    return ";".join(f"{name}={value}" for name, value in fields)


def thread(rng: random.Random) -> str:
    """A message, then its card, sometimes with the agent's reply or note."""
    made = ticket(rng, plain=rng.random() < 0.6)
    after = [card(rng, made)]
    if rng.random() < 0.25:
        after.append(reply(rng, made, made.language))
    if rng.random() < 0.25:
        after.append(note(rng, made))
    rng.shuffle(after)
    return "\n".join([made.message, *after])


def glossary(rng: random.Random) -> str:
    """Words of both languages, side by side."""
    lines = []
    for product in rng.sample(list(PHRASES["products"]), 5):
        names = PHRASES["products"][product]
        lines.append(f"{rng.choice(names['zh'])} = {product} ({rng.choice(names['en'])})")
    return "\n".join(lines)


def stock_list(rng: random.Random) -> str:
    """Orders with what is in them, then the same asked again: what stands beside a number follows it later."""
    products = rng.sample(list(PHRASES["products"]), 4)
    orders = {digits(rng, 4): product for product in products}
    asked = list(orders.items())
    rng.shuffle(asked)
    lines = [f"order {order}: {product}" for order, product in orders.items()]
    return "\n".join(lines + [f"The {product} is order {order}." for order, product in asked])


def repeats(rng: random.Random) -> str:
    """Numbers and words, said twice: the plainest lesson in copying."""
    things = [digits(rng, 4) for _ in range(3)] + rng.sample(list(PHRASES["products"]), 2)
    rng.shuffle(things)
    return f"{', '.join(things)}. Again: {', '.join(things)}."


def records(rng: random.Random) -> str:
    """The shop's other records, in JSON of other keys and orders than the task's."""
    lines = []
    for _ in range(3):
        product, team = rng.choice(list(PHRASES["products"])), rng.choice(list(PHRASES["teams"]))
        record: dict[str, Any] = rng.choice(
            (
                {"product": product, "stock": digits(rng, 2), "new": rng.random() < 0.5},
                {"order": digits(rng, 4), "paid": rng.random() < 0.5, "product": product},
                {"team": team, "open": digits(rng, 2), "urgent": digits(rng, 1)},
                {"name": team, "away": rng.random() < 0.5},
            )
        )
        lines.append(json.dumps(record, separators=(",", ":")))
    return "\n".join(lines)


MAKERS: tuple[Callable[[random.Random], str], ...] = (thread, glossary, stock_list, repeats, records)
WEIGHTS = (77, 4, 6, 8, 5)


def corpus(seed: int, documents: int, barred: set[str]) -> Iterator[str]:
    """Documents of one piece each; no message in them is in `barred`.

    Short documents, because a model learns to look a thing up the sooner the fewer tokens there are to look at.
    """
    rng = random.Random(seed)
    made = 0
    while made < documents:
        text = rng.choices(MAKERS, WEIGHTS)[0](rng)
        if text.split("\n", 1)[0] not in barred:
            made += 1
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2600)
    parser.add_argument("--corpus", type=Path, help="write the pretraining corpus to this file instead")
    parser.add_argument("--pairs", action="store_true", help="write preferences.jsonl instead")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    source = tickets(arguments.seed)
    made = [next(source) for _ in range(arguments.rows)]
    if arguments.pairs:
        path = HERE / "preferences.jsonl"
        rows = list(pairs(arguments.seed + 2, PAIRS, {one.message for one in made}))
    elif arguments.corpus is None:
        path, rows = HERE / "triage.jsonl", [row(one) for one in made]
    else:
        path = arguments.corpus
        rows = [
            {"text": text} for text in corpus(arguments.seed + 1, arguments.documents, {one.message for one in made})
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
