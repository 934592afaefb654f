"""Text as a terminal may be given it."""

import sys
import unicodedata

_KEPT = "\n\t"


def printable(text: str) -> str:
    """The text with every character that a terminal would obey in place of showing it written out, as `\\x1b`.

    Those are control characters (colours, cursor moves, titles, bells) and the invisible ones that turn the direction of writing or
    stand alone as half of a character. Lines and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _OBEYED else _written(c) for c in text)


# Control characters, formatting characters and surrogates. Zero-width joiners belong to the writing of several languages, and to emoji.
_OBEYED = ("Cc", "Cf", "Cs")


def _written(c: str) -> str:
    return c if c in "\u200c\u200d" else c.encode("unicode_escape", "surrogatepass").decode()


def tell(text: str) -> None:
    """Prints one line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)
