"""What OpenMoji scenes are made of: subjects, settings, colours, relations, numbers."""

from dataclasses import dataclass
from typing import Any

Scene = dict[str, Any]  # what `meta["scene"]` of a sample holds
Entry = dict[str, Any]  # a subject in it: name, count, colour


@dataclass(frozen=True)
class Subject:
    """Something a scene can show.

    Attributes:
        codepoint: the OpenMoji file name without `.svg`.
        category: animal, food, vehicle, plant, object or weather.
        plural: the noun for two or more, or "" for what is never counted (the sun).
        fills: the SVG fills that paint replaces, for a named colour its light tone first, then its dark one.
        natural: what replaces `fills` when no colour is named; empty to keep them.
        tintable: whether captions may name a colour.
    """

    codepoint: str
    category: str
    plural: str
    fills: tuple[str, ...] = ()
    natural: tuple[str, ...] = ()
    tintable: bool = False


@dataclass(frozen=True)
class Setting:
    """Where a scene takes place.

    Attributes:
        place: the phrase with its natural preposition, as in "a bear in a forest".
        known: the same with the definite article, as in "there is a bear in the forest".
        noun: the place alone, as in "a forest with a bear".
    """

    place: str
    known: str
    noun: str


_RED = ("#ea5a47", "#d22f27")


_YELLOW = ("#fcea2b", "#f1b31c")


def _subject(codepoint: str, category: str, plural: str, fills: tuple[str, ...] = ()) -> Subject:
    return Subject(codepoint, category, plural, fills, tintable=bool(fills))


# The order is part of the held-out rule: append, never reorder.
SUBJECTS: dict[str, Subject] = {
    "bear": _subject("1F43B", "animal", "bears"),
    "cat": Subject("1F431", "animal", "cats", ("#f4aa41",), ("#9d9da8",)),
    "dog": _subject("1F415", "animal", "dogs"),
    "fox": _subject("1F98A", "animal", "foxes"),
    "rabbit": _subject("1F407", "animal", "rabbits"),
    "lion": _subject("1F981", "animal", "lions"),
    "elephant": _subject("1F418", "animal", "elephants"),
    "giraffe": _subject("1F992", "animal", "giraffes"),
    "zebra": _subject("1F993", "animal", "zebras"),
    "cow": _subject("1F404", "animal", "cows"),
    "pig": _subject("1F416", "animal", "pigs"),
    "monkey": _subject("1F412", "animal", "monkeys"),
    "panda": _subject("1F43C", "animal", "pandas"),
    "penguin": _subject("1F427", "animal", "penguins"),
    "owl": _subject("1F989", "animal", "owls"),
    "chick": _subject("1F424", "animal", "chicks"),
    "frog": _subject("1F438", "animal", "frogs"),
    "turtle": _subject("1F422", "animal", "turtles"),
    "snake": _subject("1F40D", "animal", "snakes"),
    "fish": _subject("1F41F", "animal", "fish"),
    "whale": _subject("1F433", "animal", "whales"),
    "octopus": _subject("1F419", "animal", "octopuses"),
    "crab": _subject("1F980", "animal", "crabs"),
    "butterfly": _subject("1F98B", "animal", "butterflies"),
    "ladybug": _subject("1F41E", "animal", "ladybugs"),
    "snail": _subject("1F40C", "animal", "snails"),
    "apple": _subject("1F34E", "food", "apples"),
    "banana": _subject("1F34C", "food", "bananas"),
    "strawberry": _subject("1F353", "food", "strawberries"),
    "avocado": _subject("1F951", "food", "avocados"),
    "watermelon": _subject("1F349", "food", "watermelons"),
    "pineapple": _subject("1F34D", "food", "pineapples"),
    "carrot": _subject("1F955", "food", "carrots"),
    "pumpkin": _subject("1F383", "food", "pumpkins"),
    "pizza": _subject("1F355", "food", "pizzas"),
    "burger": _subject("1F354", "food", "burgers"),
    "donut": _subject("1F369", "food", "donuts"),
    "cake": _subject("1F382", "food", "cakes"),
    "car": _subject("1F697", "vehicle", "cars", _RED[:1]),
    "bus": _subject("1F68C", "vehicle", "buses", _RED[:1]),
    "tractor": _subject("1F69C", "vehicle", "tractors"),
    "bicycle": _subject("1F6B2", "vehicle", "bicycles"),
    "airplane": _subject("2708", "vehicle", "airplanes"),
    "helicopter": _subject("1F681", "vehicle", "helicopters"),
    "rocket": _subject("1F680", "vehicle", "rockets"),
    "tree": _subject("1F333", "plant", "trees"),
    "flower": _subject("1F33C", "plant", "flowers", _YELLOW[:1]),
    "mushroom": _subject("1F344", "plant", "mushrooms"),
    "leaf": _subject("1F341", "plant", "leaves"),
    "balloon": _subject("1F388", "object", "balloons", _RED),
    "ball": _subject("1F3C0", "object", "balls", ("#f4aa41", "#e27022")),
    "book": _subject("1F4D5", "object", "books", ("#d22f27",)),
    "umbrella": _subject("2602", "object", "umbrellas", ("#b399c8", "#8967aa")),
    "hat": _subject("1F3A9", "object", "hats", ("#3f3f3f", "#fcea2b")),
    "guitar": _subject("1F3B8", "object", "guitars", _RED[:1]),
    "chair": _subject("1FA91", "object", "chairs", _YELLOW),
    "gift": _subject("1F381", "object", "gifts", _YELLOW),
    "clock": _subject("23F0", "object", "clocks"),
    "key": _subject("1F511", "object", "keys"),
    "robot": _subject("1F916", "object", "robots"),
    "crown": _subject("1F451", "object", "crowns"),
    "sun": _subject("2600", "weather", ""),
    "rainbow": _subject("1F308", "weather", ""),
    "snowman": _subject("26C4", "weather", "snowmen"),
}


# The order is part of the held-out rule: append, never reorder.
SETTINGS: dict[str, Setting] = {
    "forest": Setting("in a forest", "in the forest", "a forest"),
    "beach": Setting("on a beach", "on the beach", "a beach"),
    "desert": Setting("in a desert", "in the desert", "a desert"),
    "snow": Setting("in the snow", "in the snow", "a snowy place"),
    "city": Setting("in a city at night", "in the city at night", "a city at night"),
    "meadow": Setting("in a meadow", "in the meadow", "a meadow"),
    "sea": Setting("in the sea", "in the sea", "the sea"),
    "space": Setting("in space", "in space", "space"),
    "mountains": Setting("in the mountains", "in the mountains", "the mountains"),
    "living room": Setting("in a living room", "in the living room", "a living room"),
    "farm": Setting("on a farm", "on the farm", "a farm"),
    "volcano": Setting("near a volcano", "near the volcano", "a volcano"),
}


# The named colours: the light and the dark fill that a tintable subject is repainted with.
COLORS: dict[str, tuple[str, str]] = {
    "red": ("#ea3a33", "#c22020"),
    "blue": ("#3f8fe0", "#2463b4"),
    "green": ("#6cc04a", "#3f8f2f"),
    "yellow": ("#fce83a", "#e9c81e"),
    "purple": ("#9a63d0", "#7340a8"),
    "orange": ("#f7921e", "#d9700f"),
}


RELATIONS = ("next to", "to the left of", "to the right of", "above", "below")


NUMBERS = {1: "one", 2: "two", 3: "three"}


OPPOSITES = {
    "next to": "next to",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


SUBJECT_NAMES = tuple(SUBJECTS)
UNSEEN = {"flamingo": Subject("1F9A9", "animal", "flamingos")}  # in no scene: for an adapter to be taught


SETTING_NAMES = tuple(SETTINGS)
