"""Stop strings in text that is still growing."""

from collections.abc import Sequence


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for place in (text.find(end) for end in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that more tokens cannot take back.

    What may be the beginning of a stop string is held back, and so is a character whose bytes are
    not all there yet (tokenizers decode it as U+FFFD).
    """
    text = text.rstrip("\ufffd")
    for length in range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1):
        if any(end.startswith(text[-length:]) for end in stop):
            return text[:-length]
    return text
