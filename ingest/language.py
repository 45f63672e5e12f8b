"""Which languages a caption may be in.

py3langid (naive Bayes over byte n-grams, its model inside the package) gives every language a probability. A short
caption rarely has one clear winner, so a caption is left out only where all wanted languages are far behind the best.
"""

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from cluster.errors import UserError

# Of the winner's probability. Measured in docs/decisions/0007-py3langid-for-caption-languages.md.
_AS_LIKELY = 0.3
# The language of a caption is in its beginning; the rest of a megabyte adds time only.
_LOOKED_AT = 2000


class Languages:
    """Says whether a caption may be in one of the wanted languages (ISO 639-1)."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = self._identifier.labels
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise UserError(
                f"images.filters.languages names {', '.join(map(repr, unknown))}, which are not among the known "
                f"languages; take two-letter codes (ISO 639-1) out of {' '.join(sorted(known))}"
            )
        self._wanted = frozenset(wanted)

    def has(self, caption: str) -> bool:
        ranked = self._identifier.rank(caption[:_LOOKED_AT])
        best = ranked[0][1]
        return any(language in self._wanted and share >= _AS_LIKELY * best for language, share in ranked)
