"""Captions that say nothing of the picture: patterns in RE2's syntax, all tried in one pass and in linear time.

Python's own regular expressions can take exponential time on a caption made for it; RE2 cannot. It knows no
look-around and no back-references. Patterns ignore case and may match anywhere unless they are anchored.
"""

import re2

from cluster.errors import UserError

# unCLIP's data left out captions such as "photographed on <date>" (DALL·E, appendix C).
DEFAULT_PATTERNS = (
    r"\b(photographed|photo taken|picture taken|image taken|taken|uploaded|posted|published) on \w{0,9}[ ,.]*\d",
    r"^\W*(img|image|imag|dsc|dscn|dscf|dsc_?n|pict?|photo|picture|foto|screenshot|screen shot|scan|untitled|p)"
    r"[ _\-.#(]*\d+\W*(\.?(jpe?g|png|gif|webp|bmp|tiff?))?\W*$",
    r"^\W*[\w\-]+\.(jpe?g|png|gif|webp|bmp|tiff?)\W*$",
    r"^\W*(image|photo|picture|thumbnail|logo|icon|banner|placeholder|untitled"
    r"|no (image|photo|title|caption)( available)?|image (not found|unavailable|coming soon)"
    r"|alt( text)?|default|null|undefined|nan)\W*$",
    r"\b(click|tap) (here|(on )?(the )?(image|photo|picture|thumbnail))\b",
    r"\b(click|hover|tap) to (enlarge|zoom|view|expand|see)\b",
    r"\b(all rights reserved|copyright (©|\(c\))? ?\d{4}|(©|\(c\)) ?\d{4})",
    r"\b(terms of (use|service)|privacy policy|cookie (policy|settings))\b",
    r"\b(share|follow us|pin it|tweet this|like us) on (facebook|twitter|pinterest|instagram|linkedin)\b",
    r"\bthis (image|photo|picture) (is|was|has been) (not available|removed|deleted|hidden)",
    r"\b(image|photo) (may|might) contain:?",
    r"^\W*(https?://|www\.)\S+\W*$",
    r"^[\W\d_]*$",
)
# A caption of a megabyte is no caption; its first part is judged.
_LOOKED_AT = 10_000


class Boilerplate:
    """All patterns as one automaton."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        options = re2.Options()
        options.case_sensitive = False
        options.log_errors = False
        self._set = re2.Set.SearchSet(options)
        for pattern in patterns:
            try:
                re2.compile(pattern, options)
                self._set.Add(pattern)
            except re2.error as error:
                raise UserError(
                    f"images.filters.boilerplate_patterns: {pattern!r} is no pattern in RE2's syntax ({_said(error)}); "
                    "it has no look-around and no back-references"
                ) from None
        self._set.Compile()

    def is_in(self, caption: str) -> bool:
        return bool(self._set.Match(caption[:_LOOKED_AT].encode("utf-8", "replace")))


def _said(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
