"""One spelling for URLs, and for hosts, that mean the same. For comparing: what is fetched is checked elsewhere."""

import re

_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.\-]*):[/\\]*(?:[^/\\?#@]*@)?(\[[^\]/\\]*\]|[^/\\?#:]*)(?::(\d*))?([^#]*)", re.S
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_KEPT = _UNRESERVED | frozenset("%/:@!$&'()*+,;=?[]|")
_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")


def normalised_url(url: str) -> str | None:
    """One spelling for URLs that mean the same picture; None for what has no scheme and host.

    http and https are one; the host is lower case, in its ASCII form, without a final dot; the default port, user
    information and fragment are dropped; `.` and `..` are resolved; an escape of a plain character is undone and any
    other written in capitals. The order of a query's parts and the case of a path stay: they may mean something.
    """
    text = re.sub(r"[\t\r\n]", "", url).strip("".join(map(chr, range(33))))
    split = _URL.match(text)
    if split is None or not split[2]:
        return None
    scheme, port = split[1].lower(), split[3]
    port = "" if port in (None, "", _DEFAULT_PORTS.get(scheme)) else f":{port}"
    path, mark, query = split[4].partition("?")
    path = _without_dots(_escaped(path.replace("\\", "/")))
    kind = "" if scheme in _DEFAULT_PORTS else scheme
    return f"{kind}//{canonical_host(split[2])}{port}{path}{mark if query else ''}{_escaped(query)}"


def canonical_host(host: str) -> str:
    """Lower case, ASCII (IDNA), without brackets, escapes or a final dot."""
    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), host).strip("[]").rstrip(".").lower()
    if text.isascii():
        return text
    try:
        return text.encode("idna").decode("ascii")
    except UnicodeError:
        return text


def url_host(url: str) -> str:
    """In canonical form; empty where there is none."""
    split = _URL.match(url.strip())
    return canonical_host(split[2]) if split else ""


def _escaped(text: str) -> str:
    """Percent-encoding in its shortest spelling."""

    def plain(found: re.Match[str]) -> str:
        letter = chr(int(found[1], 16))
        return letter if letter in _UNRESERVED else found[0].upper()

    return "".join(
        letter if letter in _KEPT else "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))
        for letter in _ESCAPE.sub(plain, text)
    )


def _without_dots(path: str) -> str:
    kept: list[str] = []
    parts = path.split("/")[1:] or [""]
    for part in parts:
        if part == "..":
            kept[-1:] = []
        elif part != ".":
            kept.append(part)
    if parts[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
