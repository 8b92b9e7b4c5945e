"""Text of other people (file names, formulas, messages) made safe to show on a terminal."""


def printable(text: str) -> str:
    r"""Return text whose control characters and broken encodings are spelled out.

    A file name may hold an escape sequence that clears the screen, or bytes that are no UTF-8; a
    line of ours must neither obey nor break on them. Line breaks and tabs stay.

    Example:
        >>> printable("cu\x1b[2J.cif")
        'cu\\x1b[2J.cif'
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
