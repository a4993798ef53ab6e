"""Text of strangers made safe to show on a terminal.

Prompts, generated texts, names and paths may hold control characters, which move the cursor,
change colours or write over earlier lines. They are shown as escapes; everything that prints,
emoji and combining marks included, stays as it is.

    "bad\\x1b[2Jtext"  ->  printable  ->  r"bad\\x1b[2Jtext"
"""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls, but for tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of the text around them
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff]"  # halves of surrogate pairs: no encoding has them
)


def printable(text: object, *, one_line: bool = False) -> str:
    r"""Return ``str(text)`` with control characters as escapes such as ``\x1b``.

    Args:
        one_line: Also escape newlines, where a line of its own could be mistaken for another message.
    """
    shown = _UNSAFE.sub(lambda found: _escaped(found[0]), str(text))
    return shown.replace("\n", "\\n") if one_line else shown


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
