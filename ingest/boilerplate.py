"""Captions that say nothing of the picture: patterns in RE2's syntax, all tried in one pass and in linear time.

Python's own regular expressions can take exponential time on a caption made for it; RE2 cannot. It knows no
look-around and no back-references. Patterns ignore case and may match anywhere unless they are anchored.
"""

import re2

from cluster.errors import UserError

# RE2's \w and \W know ASCII only: in front of and behind a phrase stands what is no letter and no number of any script.
_EDGE = r"[^\p{L}\p{N}]*"
_FILE = r"\.(jpe?g|png|gif|webp|bmp|tiff?)"
# unCLIP's data left out captions such as "photographed on <date>" (DALL·E, appendix C). A phrase that may stand beside
# a true description counts only where the caption is nothing else, or begins with it.
DEFAULT_PATTERNS = (
    r"\b(photographed|taken|uploaded|posted|published) on [\pL]{0,9}[ ,.]*\d",
    rf"^{_EDGE}(img|image|dscn?|dscf|pict?|photo|picture|foto|screen ?shot|scan|untitled|p)[ _\-.#(]*\d+"
    rf"{_EDGE}({_FILE})?{_EDGE}$",
    rf"^{_EDGE}[\pL\pN_\-]+{_FILE}{_EDGE}$",
    rf"^{_EDGE}(image|photo|picture|thumbnail|logo|icon|banner|placeholder|untitled|default|null|undefined|nan){_EDGE}$",
    rf"^{_EDGE}(no (image|photo|title|caption)( available)?|alt( text)?){_EDGE}$",
    rf"^{_EDGE}(image|photo|picture) (not found|not available|unavailable|coming soon){_EDGE}$",
    r"\b(click|tap) (here|(on )?(the )?(image|photo|picture|thumbnail))\b",
    r"\b(click|hover|tap) to (enlarge|zoom|view|expand|see)\b",
    rf"^{_EDGE}(all rights reserved|copyright\b|\(c\) ?\d)",
    rf"^{_EDGE}(terms of (use|service)|privacy policy|cookie (policy|settings))\b",
    r"\b(share|follow us|pin it|tweet this|like us) on (facebook|twitter|pinterest|instagram|linkedin)\b",
    r"\bthis (image|photo|picture) (is not available|(was|has been) (removed|deleted))",
    rf"^{_EDGE}(https?://|www\.)\S+\s*$",
    r"^[^\pL]*$",
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
