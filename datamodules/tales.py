"""Text from a small grammar of our own: English-like, free of rights, the same on every machine."""

import random

_PEOPLE = [
    "farmer",
    "baker",
    "sailor",
    "miller",
    "teacher",
    "weaver",
    "hunter",
    "shepherd",
    "doctor",
    "painter",
    "smith",
    "widow",
    "king",
    "child",
]
_THINGS = [
    "basket",
    "lamp",
    "letter",
    "coat",
    "hammer",
    "loaf",
    "boat",
    "key",
    "ladder",
    "mirror",
    "blanket",
    "kettle",
    "wheel",
    "saddle",
    "ring",
    "bottle",
    "fence",
    "book",
]
_PLACES = [
    "market",
    "river",
    "barn",
    "harbour",
    "hill",
    "garden",
    "forest",
    "bridge",
    "mill",
    "chapel",
    "kitchen",
    "square",
    "valley",
    "road",
]
_KINDS = ["old", "young", "tall", "quiet", "tired", "clever", "poor", "cheerful", "lonely", "proud"]
_LOOKS = ["heavy", "wooden", "broken", "little", "golden", "empty", "painted", "rusty", "narrow", "warm"]
_DEEDS = ["carries", "finds", "loses", "mends", "borrows", "sells", "hides", "paints", "brings", "forgets"]
_MOVES = ["walks", "runs", "rides", "hurries", "returns", "wanders"]
_TIMES = [
    "in the morning",
    "before noon",
    "at night",
    "every winter",
    "after the rain",
    "when the bell rings",
    "on the third day",
    "at dawn",
]
_SAYINGS = [
    "it is late",
    "the wind is cold",
    "nobody knows the way",
    "all will be well",
    "there is no bread",
    "you must wait",
]


class Tales:
    """Endless sentences; the same seed tells the same tale, since only `random.Random.random` is asked for numbers.

    Python promises its sequence for all versions, and not that of `random.choice`.

    Args:
        seed: any string.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def text(self, length: int) -> bytes:
        """Returns the next ``length`` bytes, ASCII; the last sentence may be cut."""
        sentences, told = [], 0
        while told < length:
            sentences.append(self._sentence())
            told += len(sentences[-1])
        return "".join(sentences)[:length].encode()

    def _one(self, words: list[str]) -> str:
        return words[int(self._random.random() * len(words))]

    def _sentence(self) -> str:
        person = f"the {self._one(_KINDS)} {self._one(_PEOPLE)}"
        form = self._random.random()
        if form < 0.4:
            told = f"{person} {self._one(_DEEDS)} the {self._one(_LOOKS)} {self._one(_THINGS)}"
        elif form < 0.7:
            told = f"{person} {self._one(_MOVES)} to the {self._one(_PLACES)} with a {self._one(_THINGS)}"
        else:
            told = f"{person} says to the {self._one(_PEOPLE)} that {self._one(_SAYINGS)}"
        if self._random.random() < 0.5:
            told += f" {self._one(_TIMES)}"
        return f"{told[0].upper()}{told[1:]}.{' ' if self._random.random() < 0.8 else chr(10)}"
