"""One answer, judged while it arrives: its head first, then every byte of its body against the caps.

An answer that is not wanted (an error, a redirect, a refusal) has its verdict once its head is there. A body that was
sent compressed is unfolded once it is whole, by whoever has a thread for that: a bomb holds up nobody else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from ingest.address import Refused
from ingest.budget import ByteBudget
from ingest.inflate import Inflater, UnknownEncoding

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
KEPT_HEADERS = frozenset(
    {b"content-length", b"transfer-encoding", b"content-encoding", b"location", b"retry-after", b"x-robots-tag"}
)
_LONGEST_RETRY_AFTER_S = 7 * 86_400.0
_ROBOTS_REFUSALS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})


class FetchFailed(Exception):
    """The web said no, or nothing.

    may_pass   another attempt may fare better
    network    no sign of life came from the host: it may be down, or we may be cut off
    attempts   that were made on the row's behalf
    """

    def __init__(self, reason: str, *, may_pass: bool, network: bool = False, attempts: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass
        self.network = network
        self.attempts = attempts


class Stale(Exception):
    """The server had closed a kept connection before our request reached it: nothing was asked, nothing failed."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What is taken of a body. `cut`: what is beyond `max_bytes` is left away, rather than the whole refused."""

    max_bytes: int
    max_decompressed_bytes: int
    respect_robots_tag: bool
    cut: bool = False


class Answer:
    """Filled by a `Connection`. Once it has ended, `failure` says why there is no body, if there is none."""

    __slots__ = (
        "_budget", "_caps", "_inflater", "_parts", "_received", "charged", "failure", "headers", "location", "pause",
        "resume", "status",
    )  # fmt: skip

    def __init__(self, caps: Caps, budget: ByteBudget) -> None:
        self._caps = caps
        self._budget = budget
        self._inflater: Inflater | None = None
        self._parts: list[bytes] = []
        self._received = 0
        self.charged = 0
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.location: str | None = None
        self.failure: Exception | None = None
        self.pause: Callable[[], None]
        self.resume: Callable[[], None]

    def begin(self) -> None:
        """It was asked for. `pause` and `resume` are set."""
        self._budget.begin(self)

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for known, value in self.headers if known == name), "")

    @property
    def body(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    @property
    def retry_after_s(self) -> float | None:
        """Of a Retry-After header, which holds seconds or an HTTP date."""
        text = self.header(b"retry-after").strip()
        if text.isascii() and text.isdigit():
            return min(float(text[:12]), _LONGEST_RETRY_AFTER_S)
        try:
            at = parsedate_to_datetime(text)
        except ValueError:
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return min(max(0.0, (at - datetime.now(UTC)).total_seconds()), _LONGEST_RETRY_AFTER_S)

    def head(self, status: int) -> bool:
        """Whether the body is wanted."""
        self.status = status
        try:
            if status in REDIRECTS:
                self.location = _text(next((value for name, value in self.headers if name == b"location"), b""))
                if not self.location:
                    raise FetchFailed("bad_redirect", may_pass=False)
                return False
            if status != 200:
                raise FetchFailed(f"http_{status}", may_pass=status in MAY_PASS)
            if self._caps.respect_robots_tag and _robots_refuse(self.headers):
                raise Refused("x_robots_tag")
            length = self.header(b"content-length")
            if not self._caps.cut and length.isdigit() and int(length[:20]) > self._caps.max_bytes:
                raise Refused("body_too_large")
            encoding = self.header(b"content-encoding").strip().lower()
            if encoding not in ("", "identity"):
                self._inflater = Inflater(encoding, self._caps.max_decompressed_bytes)
        except UnknownEncoding:
            self.failure = FetchFailed("content_encoding", may_pass=False)
        except (FetchFailed, Refused) as failure:
            self.failure = failure
        return self.failure is None

    def data(self, chunk: bytes) -> bool:
        """Whether more is wanted."""
        self._received += len(chunk)
        try:
            if self._received > self._caps.max_bytes:
                if not self._caps.cut:
                    raise Refused("body_too_large")
                chunk = chunk[: len(chunk) - (self._received - self._caps.max_bytes)]
        except Refused as refusal:
            self.failure = refusal
        if self.failure is not None:
            return False
        self._parts.append(chunk)
        self.charged += len(chunk)
        self._budget.take(self, len(chunk))
        return self._received < self._caps.max_bytes or not self._caps.cut

    def end(self) -> None:
        """The declared end of the body was there, or what the caps leave of it."""
        if self.failure is None and self.location is None and not self.charged and not self._caps.cut:
            self.failure = FetchFailed("empty_body", may_pass=False)
        self._budget.arrived(self)

    @property
    def folded(self) -> bool:
        """Whether `unfold` has to be called, and then `unfolded`."""
        return self._inflater is not None and self.failure is None

    def unfold(self) -> bytes:
        """The body as it was before it was compressed. Touches nothing else: it may run in another thread."""
        assert self._inflater is not None
        body = self._inflater.unfold(self.body)
        if not self._inflater.complete and self._received < self._caps.max_bytes:
            raise FetchFailed("connection_cut", may_pass=True)
        if not body and not self._caps.cut:
            raise FetchFailed("empty_body", may_pass=False)
        return body

    def unfolded(self, body: bytes) -> None:
        self._inflater, self._parts = None, [body]
        self._budget.unfolded(self, len(body) - self.charged)
        self.charged = len(body)

    def drop(self) -> None:
        """Give the body's bytes back to the budget."""
        self._budget.arrived(self)
        if self.charged:
            self._budget.give_back(self.charged)
            self.charged = 0
            self._parts.clear()


def _text(header: bytes) -> str:
    try:
        return header.decode()
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _robots_refuse(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether X-Robots-Tag forbids the use for everyone: a directive behind a crawler's name is not for us."""
    for name, value in headers:
        if name != b"x-robots-tag":
            continue
        header = value.decode("latin-1")
        crawler, named, rest = header.partition(":")
        if named and crawler.strip().lower() not in ("unavailable_after", "*", "unclip"):
            continue
        directives = rest if named else header
        if any(word.strip().lower() in _ROBOTS_REFUSALS for word in directives.split(",")):
            return True
    return False
