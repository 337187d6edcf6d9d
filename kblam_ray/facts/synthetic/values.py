"""Values of synthetic facts: numbers, dates, codes, names, phrases and sentences, each from its own draws."""

from __future__ import annotations

import calendar
from collections.abc import Callable, Sequence

from kblam_ray.facts.synthetic import lexicon
from kblam_ray.facts.synthetic.draws import Draws
from kblam_ray.facts.synthetic.names import Names

ValueMaker = Callable[[Draws, Names], str]
"""Makes the text of one value from its stream of draws; `Names` supplies names of people, places and companies."""


def one_of(choices: Sequence[str]) -> ValueMaker:
    return lambda draws, names: draws.pick(choices)


def some_of(choices: Sequence[str], low: int, high: int) -> ValueMaker:
    """Between `low` and `high` of `choices`, as a person would list them."""

    def make(draws: Draws, names: Names) -> str:
        items = draws.sample(choices, draws.between(low, high))
        return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"

    return make


def integer(low: int, high: int, unit: str = "", separator: str = "") -> ValueMaker:
    """An integer spread evenly over the orders of magnitude between `low` and `high`."""

    def make(draws: Draws, names: Names) -> str:
        top = high
        while top // 10 >= max(low, 1) and draws.below(2):
            top //= 10
        return f"{draws.between(low, max(low, top)):,}".replace(",", separator) + unit

    return make


def decimal(low: int, high: int, digits: int, unit: str = "") -> ValueMaker:
    def make(draws: Draws, names: Names) -> str:
        return f"{draws.between(low, high - 1)}.{draws.below(10**digits):0{digits}d}{unit}"

    return make


def year(low: int, high: int) -> ValueMaker:
    return lambda draws, names: str(draws.between(low, high))


def date(low: int, high: int) -> ValueMaker:
    """A day of the years `low` to `high`: 14 March 1962, March 14, 1962, or 1962-03-14."""

    def make(draws: Draws, names: Names) -> str:
        of_year, month = draws.between(low, high), draws.between(1, 12)
        day = draws.between(1, calendar.monthrange(of_year, month)[1])
        name = lexicon.MONTHS[month - 1]
        return draws.pick((f"{day} {name} {of_year}", f"{name} {day}, {of_year}", f"{of_year}-{month:02d}-{day:02d}"))

    return make


def code(shape: str) -> ValueMaker:
    """A code of a shape in which 9 stands for a digit and A for a letter: `AA-9999`."""

    def make(draws: Draws, names: Names) -> str:
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        return "".join(
            str(draws.below(10)) if mark == "9" else draws.pick(letters) if mark == "A" else mark for mark in shape
        )

    return make


def name_of(*kinds: str) -> ValueMaker:
    return lambda draws, names: names.mention(draws.pick(kinds), draws)


def money(draws: Draws, names: Names) -> str:
    amount = draws.between(1, 999)
    scale = draws.pick(("", " thousand", " million", " billion"))
    return f"{amount}{scale} {draws.pick(lexicon.CURRENCIES)}s".replace("yens", "yen")


def coordinates(draws: Draws, names: Names) -> str:
    latitude, longitude = (
        f"{draws.below(90)}.{draws.below(10_000):04d}",
        f"{draws.below(180)}.{draws.below(10_000):04d}",
    )
    return f"{latitude}° {draws.pick('NS')}, {longitude}° {draws.pick('EW')}"


def email(draws: Draws, names: Names) -> str:
    who, where = draws.pick(lexicon.LAST_NAMES).lower(), f"{draws.pick(lexicon.NOUNS)}-{draws.pick(lexicon.NOUNS)}"
    return f"{draws.pick(('info', 'desk', 'hello', who))}@{where}.example"


def opening_hours(draws: Draws, names: Names) -> str:
    first = draws.below(5)
    days = f"{lexicon.WEEKDAYS[first]} to {lexicon.WEEKDAYS[draws.between(first + 1, 6)]}"
    opens = f"{draws.between(6, 11):02d}:{draws.pick(('00', '15', '30'))}"
    return f"{days}, {opens}-{draws.between(15, 22)}:{draws.pick(('00', '30'))}"


def motto(draws: Draws, names: Names) -> str:
    verb = draws.pick(("Trust", "Follow", "Remember", "Never fear", "Be", "Guard", "Walk with", "Listen to"))
    return f"{verb} the {draws.pick(lexicon.ADJECTIVES)} {draws.pick(lexicon.NOUNS)}"


def thing(draws: Draws, names: Names) -> str:
    """A short noun phrase: a brass lantern."""
    adjective = draws.pick(lexicon.ADJECTIVES)
    article = "an" if adjective[0] in "aeiou" else "a"
    return f"{article} {adjective} {draws.pick(lexicon.NOUNS)}"


def deed(draws: Draws, names: Names) -> str:
    """What somebody did, a phrase of five to ten words."""
    return (
        f"{draws.pick(lexicon.VERBS)} the {draws.pick(lexicon.ADJECTIVES)} {draws.pick(lexicon.NOUNS)} "
        f"of {names.mention('city', draws)} in {draws.between(1850, 2024)}"
    )


def purpose(draws: Draws, names: Names) -> str:
    return draws.pick(lexicon.PURPOSES)


def description(draws: Draws, names: Names) -> str:
    """One sentence of ten to thirty words."""
    where = draws.pick((f"near {names.mention('city', draws)}", f"in {draws.pick(lexicon.COUNTRIES)}", "on the coast"))
    opening = draws.pick(("known for", "remembered because of", "often compared to", "named after", "admired for"))
    tail = draws.pick(
        (
            f"and was {draws.pick(lexicon.VERBS)} by {names.mention('person', draws)}",
            f"and exists {draws.pick(lexicon.PURPOSES)}",
            f"though few people {where} have seen it",
            f"ever since it was {draws.pick(lexicon.VERBS)} in {draws.between(1700, 2024)}",
        )
    )
    sentence = f"{opening} {thing(draws, names)} {where} {tail}"
    return sentence[0].upper() + sentence[1:] + "." if draws.below(2) else sentence
