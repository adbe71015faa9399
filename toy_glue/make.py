"""Write the toy tasks: six small made-up data sets in the official GLUE TSV format.

They are smoke data for a machine without GLUE, never a measure of anything. Running
this file rewrites the data beside it; `build()` returns the same texts. Of `random`
only `random()` is used, which gives the same numbers for an integer seed on every
Python version.

The pair tasks rest on an event: who did what to which thing, where and when. Two
sentences about one event differ in order, voice and synonyms; a wrong pair differs in
one detail, in two or in all. A changed detail is drawn just as the first one was, so no
sentence alone betrays the label.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TRAIN, DEV = 1200, 300
# What each costs in STS-B, of 5.
COST = {"who": 1.25, "verb": 1.0, "what": 1.25, "where": 0.75, "when": 0.75}
SLOTS = tuple(COST)
LABELS = ("not_entailment", "entailment")


def read_words() -> dict[str, list[str]]:
    """The lists of words.txt. There "/" parts synonyms, and a verb is "base past"."""
    lists = {}
    for block in (HERE / "words.txt").read_text(encoding="utf-8").split("\n\n"):
        name, text = block.split(":")
        lists[name] = [" ".join(words.split()) for words in text.split(";")]
    return lists


WORDS = read_words()
# The things suit the verbs.
ACTS = [(WORDS[f"verbs {k}"], WORDS[f"things {k}"]) for k in (1, 2, 3)]


class Dice(random.Random):
    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.random() * len(items))]

    def some(self, items: Sequence[Any], count: int) -> list[Any]:
        """Pick `count` different items, in random order (Fisher-Yates)."""
        left = list(items)
        for k in range(count):
            other = k + int(self.random() * (len(left) - k))
            left[k], left[other] = left[other], left[k]
        return left[:count]


def new_event(dice: Dice) -> dict[str, str]:
    pools = (WORDS["who"], *dice.pick(ACTS), WORDS["where"], WORDS["when"])
    return {slot: dice.pick(pool) for slot, pool in zip(SLOTS, pools, strict=True)}


def change(dice: Dice, event: dict[str, str], slots: Sequence[str]) -> dict[str, str]:
    """An event that differs in just these slots; its verb still suits its thing."""
    while True:
        drawn = new_event(dice)
        other = event | {slot: drawn[slot] for slot in slots}
        verb, what = other["verb"], other["what"]
        suits = any(verb in verbs and what in things for verbs, things in ACTS)
        if suits and all(other[slot] != event[slot] for slot in slots):
            return other


def spoil(dice: Dice, event: dict[str, str], slots: Sequence[str]) -> dict[str, str]:
    """Change one of these slots, two of them, or simply everything."""
    count = dice.pick([1, 2, 5])
    return change(dice, event, SLOTS if count == 5 else dice.some(slots, count))


def worded(dice: Dice, event: dict[str, str]) -> dict[str, str]:
    """Settle on one synonym for each slot, and part the verb into "base" and "past"."""
    words = {slot: dice.pick(event[slot].split("/")) for slot in SLOTS}
    return words | dict(zip(("base", "past"), words["verb"].split(), strict=True))


def sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


def tell(
    dice: Dice, event: dict[str, str], extras: Sequence[str] = ("where", "when")
) -> str:
    """State the event, with its place, its time or both."""
    words = worded(dice, event)
    active = "the {who} {past} the {what}"
    passive = "the {what} was {past} by the {who}"
    cleft = "it was the {who} who {past} the {what}"
    core = dice.pick([active, active, passive, cleft])
    tail = [words[slot] for slot in dice.some(extras, len(extras))]
    front = tail.pop() + ", " if dice.random() < 0.3 else ""
    return sentence(front + " ".join([core.format_map(words), *tail]))


# The makers: each returns the fields of one row, for a label that follows from `i`.
def rte(dice: Dice, i: int) -> tuple[str, ...]:
    event, extra = new_event(dice), dice.pick(["where", "when"])
    claim = event if i % 2 else spoil(dice, event, ("who", "verb", "what", extra))
    return tell(dice, event), tell(dice, claim, [extra]), LABELS[i % 2]


def mrpc(dice: Dice, i: int) -> tuple[str, ...]:
    event = new_event(dice)
    first = tell(dice, event)
    second = tell(dice, event if i % 2 else spoil(dice, event, SLOTS))
    return first, second, str(i % 2)


def stsb(dice: Dice, i: int) -> tuple[str, ...]:
    event, slots = new_event(dice), dice.some(SLOTS, i % 6)
    score = 5 - sum(COST[slot] for slot in slots)
    return tell(dice, event), tell(dice, change(dice, event, slots)), f"{score:.3f}"


def qnli(dice: Dice, i: int) -> tuple[str, ...]:
    """A wrong answer tells of another event, or where for when, or when for where."""
    event, question = new_event(dice), dice.pick(WORDS["questions"])
    asked = question.split()[0]
    extra = asked if asked in ("where", "when") else dice.pick(["where", "when"])
    words = worded(dice, event)
    ask = sentence(question.format_map(words | {"extra": words[extra]}), "?")
    if not i % 2 and asked == extra and dice.random() < 0.5:
        extra = "when" if asked == "where" else "where"
    elif not i % 2:
        slots = [slot for slot in ("who", "verb", "what", extra) if slot != asked]
        event = spoil(dice, event, slots)
    return ask, tell(dice, event, [extra]), LABELS[i % 2]


def cola(dice: Dice, i: int) -> tuple[str, ...]:
    """A fault is a wrong verb form, or a word that is lost, doubled or swapped."""
    event, bad = new_event(dice), 1 - i % 2
    if dice.random() < 0.3:  # "right>wrong" in a pattern
        text = sentence("the " + dice.pick(WORDS["slips"]) + " the {what} {where}")
        told = text.format_map(worded(dice, event))
        words = [word.split(">")[-bad] for word in told.split()]
    else:
        words, fault = tell(dice, event).split(), dice.pick(["drop", "double", "swap"])
        inner, small = range(1, len(words) - 2), ("the", "was", "by")
        spots = [k for k in inner if words[k] in small]
        for k in reversed(spots * bad):
            one, two = words[k : k + 2]
            faulty = {"drop": [two], "double": [one, one, two], "swap": [two, one]}
            words[k : k + 2] = faulty[fault]
    return str(i % 2), "*" * bad, " ".join(words)


def sst2(dice: Dice, i: int) -> tuple[str, ...]:
    """In an opinion {a} and {b} speak for the label, {x} and {y} against it."""
    own, other = ("good", "bad") if i % 2 else ("bad", "good")
    words = []
    for name in (own, other, "parts"):
        words += dice.some(WORDS[name], 2)
    opinion = dice.pick(WORDS["opinions"])
    return opinion.format_map(dict(zip("abxypq", words, strict=True))), str(i % 2)


TASKS = {  # maker, header and row; "|" stands for a tab
    "RTE": (rte, "index|sentence1|sentence2|label\n", "{i}|{0}|{1}|{2}\n"),
    "MRPC": (
        mrpc,
        "Quality|#1 ID|#2 ID|#1 String|#2 String\n",
        "{2}|{i}1|{i}2|{0}|{1}\n",
    ),
    "STS-B": (
        stsb,
        "index|genre|filename|year|old_index|source1|source2"
        "|sentence1|sentence2|score\n",
        "{i}|toy|toy|2024|{i:04d}|none|none|{0}|{1}|{2}\n",
    ),
    "CoLA": (cola, "", "toy|{0}|{1}|{2}\n"),
    "SST-2": (sst2, "sentence|label\n", "{0}|{1}\n"),
    "QNLI": (qnli, "index|question|sentence|label\n", "{i}|{0}|{1}|{2}\n"),
}


def build() -> dict[str, str]:
    """The text of every file, by its relative path."""
    files = {}
    for seed, (task, (make, head, form)) in enumerate(TASKS.items()):
        dice, seen = Dice(seed), set[str]()
        for name, count in ("train", TRAIN), ("dev", DEV):
            rows: list[tuple[str, ...]] = []
            while len(rows) < count:
                row = make(dice, len(rows))
                said = [field for field in row if " " in field]
                # No sentence comes twice.
                if len(seen.union(said)) == len(seen) + len(said):
                    seen.update(said)
                    rows.append(row)
            mixed = dice.some(rows, count)
            lines = [form.format(*row, i=i) for i, row in enumerate(mixed)]
            files[f"{task}/{name}.tsv"] = (head + "".join(lines)).replace("|", "\t")
    return files


if __name__ == "__main__":
    for path, text in build().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8", newline="\n")
