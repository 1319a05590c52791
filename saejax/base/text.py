"""Text of a corpus for display: nothing in it can run, hide, reorder or swell."""

import json
import unicodedata

LONGEST = 48  # characters of one token that are shown
_PICTURES = {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\x7f": "\u2421"}
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # controls, bidi and zero-width, unassigned, surrogates, separators


def visible(text: str, longest: int = LONGEST) -> str:
    """`text` with every character that is invisible, or moves others, written out; a long one is cut.

    Newline and tab become arrows, other C0 controls their Unicode pictures (NUL: U+2400), all else of the categories Cc, Cf, Cn,
    Co, Cs, Zl and Zp (bidirectional overrides, zero-width characters, lone surrogates ...) its number, as <U+202E> in angle
    brackets; blanks that are not U+0020 too. A combining mark at the beginning gets a dotted circle, and stacks of them are cut.
    """
    shown, marks = [], 0
    for character in text[:longest]:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if marks > 3:
            continue
        if category in ("Mn", "Me") and not shown:
            shown.append("\u25cc")
        if character in _PICTURES:
            shown.append(_PICTURES[character])
        elif character < " ":
            shown.append(chr(0x2400 + ord(character)))
        elif category in _HIDDEN or (category == "Zs" and character != " "):
            shown.append(f"\u2039U+{ord(character):04X}\u203a")
        else:
            shown.append(character)
    return "".join(shown) + ("\u2026" if len(text) > longest else "")


def script_json(value) -> str:
    """JSON that is safe inside a script, element or file: ASCII only, with <, > and & escaped. NaN and Inf are refused."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
