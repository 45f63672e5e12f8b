"""The corpus: every kind of trouble that a row can bring, and how that row must end.

A kind's URL is `http://127.0.1.n:PORT/<name>` on a host of its own unless it says otherwise; `{here}` stands for that
host and port, `{port}` for the port of all hosts, `{canary}` for one that nobody may knock at.
"""

import gzip
import zlib
from dataclasses import dataclass
from functools import cache

from tests.ingest import hostile_bytes as made
from tests.ingest.hostile_bytes import JPEG
from tests.ingest.hostile_web import Endless, Reset, Script, chunked, ok, to

CUT, BAD = ("fetch_failed", "connection_cut"), ("fetch_failed", "bad_response")
TOO_LARGE, SLOW, LATE = ("refused", "body_too_large"), ("fetch_failed", "too_slow"), ("fetch_failed", "deadline")
GOOD = ("ok", None)
CORRUPT, HEADER = ("undecodable", "corrupt_image"), ("undecodable", "corrupt_header")
UNKNOWN, PIXELS = ("undecodable", "unknown_format"), ("refused", "too_many_pixels")


@dataclass(frozen=True)
class Kind:
    name: str
    status: str
    reason: str | None
    answer: Script | None = None
    url: str | bytes | None = "http://{here}/{name}"
    caption: bytes | None = b"a caption"

    def url_bytes(self, host: str, port: int, canary: int) -> bytes | None:
        if not isinstance(self.url, str):
            return self.url
        values = {"{here}": f"{host}:{port}", "{name}": self.name, "{port}": str(port), "{canary}": str(canary)}
        url = self.url
        for placeholder, value in values.items():
            url = url.replace(placeholder, value)
        return url.encode()


def _refused_urls() -> list[Kind]:
    here = "{port}/"
    table: dict[str, tuple[str | bytes | None, str]] = {
        "url_null": (None, "url_missing"),
        "url_not_utf8": (b"http://\xff\xfe/", "url_not_utf8"),
        "url_empty": ("", "scheme"),
        "url_blank": (" \t ", "scheme"),
        "url_without_scheme": ("127.0.1.1/x.jpg", "scheme"),
        "url_scheme_relative": ("//127.0.0.1/x.jpg", "scheme"),
        "url_file": ("file:///etc/passwd", "scheme"),
        "url_ftp": ("ftp://127.0.0.1/x.jpg", "scheme"),
        "url_gopher": ("gopher://127.0.0.1:{port}/_GET", "scheme"),
        "url_data": ("data:image/png;base64,iVBORw0KGgo=", "scheme"),
        "url_javascript": ("javascript:alert(1)", "scheme"),
        "url_without_host": ("http:///x.jpg", "url_malformed"),
        "url_port_0": ("http://127.0.1.1:0/x", "url_malformed"),
        "url_port_99999": ("http://127.0.1.1:99999/x", "url_malformed"),
        "url_port_of_letters": ("http://127.0.1.1:eighty/x", "url_malformed"),
        "url_nul": ("http://127.0.1.1:{port}/a\0b", "url_malformed"),
        "url_new_line": ("http://127.0.1.1:{port}/a\r\nHost: 127.0.0.1", "url_malformed"),
        "url_tab_in_host": ("http://127.0\t.0.1:" + here, "url_malformed"),
        "url_space": ("http://127.0.1.1:{port}/a b", "url_malformed"),
        "url_long_label": ("http://" + "a" * 64 + ".test/x", "url_malformed"),
        "url_long_name": ("http://" + ".".join(["abcdefghi"] * 30) + "/x", "url_malformed"),
        "url_credentials": ("http://me:secret@127.0.0.1:" + here, "url_credentials"),
        "url_at_sign": ("http://127.0.1.1@127.0.0.1:" + here, "url_credentials"),
        "url_other_port": ("http://127.0.1.1:{canary}/x", "address_loopback"),
        "address_loopback": ("http://127.0.0.1:" + here, "address_loopback"),
        "address_localhost": ("http://localhost:" + here, "address_loopback"),
        "address_decimal": ("http://2130706433:" + here, "address_spelling"),
        "address_octal": ("http://0177.0.0.1:" + here, "address_spelling"),
        "address_hexadecimal": ("http://0x7f000001:" + here, "address_spelling"),
        "address_short": ("http://127.1:" + here, "address_spelling"),
        "address_trailing_dot": ("http://127.0.0.1.:" + here, "address_spelling"),
        "address_v6_loopback": ("http://[::1]:" + here, "address_loopback"),
        "address_v6_mapped": ("http://[::ffff:127.0.0.1]:" + here, "address_loopback"),
        "address_v6_compatible": ("http://[::127.0.0.1]:" + here, "address_loopback"),
        "address_nat64": ("http://[64:ff9b::7f00:1]:" + here, "address_loopback"),
        "address_6to4": ("http://[2002:7f00:1::]:" + here, "address_tunnel"),
        "address_unspecified": ("http://0.0.0.0:" + here, "address_unspecified"),
        "address_private": ("http://10.0.0.1/x", "address_private"),
        "address_metadata": ("http://169.254.169.254/latest/meta-data/", "address_link_local"),
        "address_carrier": ("http://100.64.0.1/x", "address_reserved"),
        "address_multicast": ("http://224.0.0.1/x", "address_multicast"),
        "address_reserved": ("http://240.0.0.1/x", "address_private"),
        "name_of_loopback": ("http://loopback.test:" + here, "address_loopback"),
        "name_of_metadata": ("http://metadata.test/x", "address_link_local"),
        "name_half_private": ("http://half.test:" + here, "address_private"),
    }
    return [Kind(name, "refused", reason, url=url) for name, (url, reason) in table.items()]


def _odd_urls() -> list[Kind]:
    picture = [ok(JPEG)]
    return [
        Kind("address_full_width", "refused", "address_loopback", url="http://127．0．0．1:{port}/x"),
        Kind("address_circled_digits", "refused", "address_loopback", url="http://①②⑦.⓪.⓪.①:{port}/x"),
        Kind("address_v6_zone", "refused", "address_spelling", url="http://[fe80::1%25lo]:{port}/x"),
        Kind("url_backslash", "refused", "url_malformed", url="http://127.0.0.1:{port}\\@{here}/x"),
        Kind("url_of_100_kb", *GOOD, picture, url="http://{here}/url_of_100_kb?" + "x" * 100_000),
        Kind("url_of_letters", *GOOD, picture, url="http://{here}/url_of_letters?q=%00&ü=%ff#fragment"),
        Kind("name_unknown", "fetch_failed", "dns", url="http://unknown.test:{port}/x"),
        Kind("name_emoji", "fetch_failed", "dns", url="http://💥.test:{port}/x"),
        Kind("name_good", *GOOD, picture, url="http://good.test:{port}/name_good"),
        # Resolves to an allowed address once and to a canary ever after.
        Kind("name_rebinding", *GOOD, [to("http://rebinding.test:{port}/again")], url="http://rebinding.test:{port}/name_rebinding"),
        Kind("tls_garbage", "fetch_failed", "tls", url="https://{here}/x"),
    ]  # fmt: skip


def _redirects() -> list[Kind]:
    targets = {
        "to_private": ("http://10.0.0.1/x.jpg", "address_private"),
        "to_metadata": ("http://169.254.169.254/latest/meta-data", "address_link_local"),
        "to_canary": ("http://127.0.0.1:{port}/x", "address_loopback"),
        "to_canary_port": ("http://127.0.1.1:{canary}/x", "address_loopback"),
        "to_v6_canary": ("http://[::1]:{port}/x", "address_loopback"),
        "to_name_of_canary": ("http://loopback.test:{port}/x", "address_loopback"),
        "to_decimal": ("http://2130706433:{port}/", "address_spelling"),
        "to_file": ("file:///etc/passwd", "scheme"),
        "to_data": ("data:image/png;base64,iVBORw0KGgo=", "scheme"),
        "to_ftp": ("ftp://127.0.0.1/x", "scheme"),
        "to_credentials": ("http://me:secret@127.0.1.1:{port}/", "url_credentials"),
        "to_nul": ("/a\0b", "url_malformed"),
    }
    found = [Kind(name, "refused", reason, [to(target)]) for name, (target, reason) in targets.items()]
    # NUL may not stand in a header at all; llhttp gives the answer up before the URL is looked at.
    found[-1] = Kind("to_nul", *BAD, [to("/a\0b")])
    return [
        *found,
        Kind("to_itself", "fetch_failed", "too_many_redirects", [to("/to_itself")]),
        Kind("to_nowhere", "fetch_failed", "bad_redirect", [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"]),
        Kind("to_far", "fetch_failed", "header_too_large", [to("/" + "x" * 1_000_000)]),
        Kind("to_picture", *GOOD, [to("/url_of_100_kb")]),
    ]


def _answers() -> list[Kind]:
    nothing = b"Content-Length: 0\r\n\r\n"
    long_head = ("fetch_failed", "header_too_large")
    bomb = made.gzipped_zeros(200 << 20)
    twice = f"Content-Length: {len(JPEG)}\r\n"
    packed = gzip.compress(JPEG, mtime=0)
    return [
        *(
            Kind(f"status_{status}", "fetch_failed", f"http_{status}", [b"HTTP/1.1 %d X\r\n%b" % (status, nothing)])
            for status in (204, 206, 304, 400, 401, 403, 404, 410, 429, 451, 500, 503, 599)
        ),
        Kind("closed", *CUT, []),
        Kind("reset", *CUT, [Reset()]),
        Kind("reset_in_body", *CUT, [ok(JPEG[:100], length=len(JPEG)), Reset()]),
        Kind("silent", *LATE, [60.0]),
        Kind("head_byte_by_byte", *SLOW, [b"HTTP/1.1 200 OK\r\n", Endless(b"X", 0.05)]),
        Kind("body_byte_by_byte", *SLOW, [ok(b"", length=1000), Endless(b"x", 0.05)]),
        Kind("head_endless", *long_head, [b"HTTP/1.1 200 OK\r\n", Endless(b"X-A: " + b"b" * 4000 + b"\r\n")]),
        Kind("head_one_long_line", *long_head, [b"HTTP/1.1 200 OK\r\nX: ", Endless(b"y" * 4000)]),
        Kind("head_100_000_lines", *long_head, [ok(JPEG, "A: b\r\n" * 100_000)]),
        Kind("interim_endless", *long_head, [Endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001)]),
        Kind("interim_then_picture", *GOOD, [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok(JPEG)]),
        Kind("switching_protocols", *BAD, [b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"]),
        Kind("http_0_9", *BAD, [JPEG]),
        Kind("not_http", *BAD, [b"\x00\x01 this is not HTTP\r\n\r\n"]),
        Kind("tls_alert", *BAD, [b"\x15\x03\x01\x00\x02\x02\x46"]),
        Kind("ssh", *BAD, [b"SSH-2.0-OpenSSH_9.6\r\n"]),
        Kind("status_not_a_number", *BAD, [b"HTTP/1.1 two OK\r\nContent-Length: 0\r\n\r\n"]),
        Kind("header_without_colon", *BAD, [b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"]),
        Kind("header_with_nul", *BAD, [ok(JPEG, "X: a\0b\r\n")]),
        Kind("length_negative", *BAD, [ok(JPEG, length="-1")]),
        Kind("length_of_letters", *BAD, [ok(JPEG, length="many")]),
        Kind("length_overflow", *BAD, [ok(JPEG, length="9" * 40)]),
        Kind("length_huge", *TOO_LARGE, [ok(JPEG, length=1 << 40)]),
        Kind("length_twice_different", *BAD, [ok(JPEG, "Content-Length: 7\r\n")]),
        Kind("length_twice_equal", *BAD, [ok(JPEG, twice)]),
        Kind("length_and_chunked", *BAD, [ok(JPEG, "Transfer-Encoding: chunked\r\n")]),
        Kind("length_too_long", *CUT, [ok(JPEG, length=len(JPEG) + 100)]),
        Kind("length_too_short", *CORRUPT, [ok(JPEG, length=len(JPEG) // 2)]),
        Kind("length_none", *GOOD, [b"HTTP/1.1 200 OK\r\n\r\n" + JPEG]),
        Kind("body_empty", "fetch_failed", "empty_body", [ok(b"")]),
        Kind("body_endless", *TOO_LARGE, [b"HTTP/1.1 200 OK\r\n\r\n", Endless(bytes(65536))]),
        Kind("chunks_good", *GOOD, [chunked(JPEG[:10], JPEG[10:])]),
        Kind("chunks_endless", *TOO_LARGE, [chunked(end=b""), Endless(b"1000\r\n" + bytes(4096) + b"\r\n")]),
        Kind("chunks_cut", *CUT, [chunked(JPEG[:100], end=b"")]),
        Kind("chunk_of_size_f", *TOO_LARGE, [chunked(end=b"fffffffffffffff\r\n"), Endless(bytes(65536))]),
        Kind("chunk_overflow", *BAD, [chunked(end=b"f" * 40 + b"\r\n" + JPEG)]),
        Kind("chunk_negative", *BAD, [chunked(end=b"-1\r\n" + JPEG)]),
        Kind("chunk_not_ended", *BAD, [chunked(end=b"4\r\n" + JPEG)]),
        Kind("chunk_extension_endless", *LATE, [chunked(end=b"4;"), Endless(b"a" * 4000, 0.01)]),
        Kind("trailers_endless", *LATE, [chunked(JPEG, end=b"0\r\n"), Endless(b"X: " + b"y" * 1000 + b"\r\n", 0.01)]),
        Kind("encoding_brotli", "fetch_failed", "content_encoding", [ok(JPEG, "Content-Encoding: br\r\n")]),
        Kind("encoding_twice", "fetch_failed", "content_encoding", [ok(packed, "Content-Encoding: gzip, gzip\r\n")]),
        Kind("encoding_lies", "fetch_failed", "content_encoding", [ok(JPEG, "Content-Encoding: gzip\r\n")]),
        Kind("encoding_gzip", *GOOD, [ok(packed, "Content-Encoding: gzip\r\n")]),
        Kind("encoding_deflate", *GOOD, [ok(zlib.compress(JPEG), "Content-Encoding: deflate\r\n")]),
        Kind("encoding_cut", *CUT, [ok(packed[:-20], "Content-Encoding: gzip\r\n")]),
        Kind("bomb_gzip", "refused", "body_too_large_decompressed", [ok(bomb, "Content-Encoding: gzip\r\n")]),
        Kind("robots_tag", "refused", "x_robots_tag", [ok(JPEG, "X-Robots-Tag: NoAI, nofollow\r\n")]),
        Kind("robots_tag_of_another", *GOOD, [ok(JPEG, "X-Robots-Tag: otherbot: noindex\r\n")]),
    ]  # fmt: skip


def _bodies() -> list[Kind]:
    bodies: dict[str, tuple[bytes, tuple[str, str | None]]] = {
        "page": (b"<!DOCTYPE html><html>gone</html>", ("undecodable", "html")),
        "svg": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", UNKNOWN),
        "zeros": (bytes(100_000), UNKNOWN),
        "half_jpeg": (JPEG[: len(JPEG) // 2], CORRUPT),
        "half_png": (made.PNG[: len(made.PNG) // 2], CORRUPT),
        "half_webp": (made.WEBP[: len(made.WEBP) // 2], HEADER),
        "half_gif": (made.GIF[: len(made.GIF) // 2], CORRUPT),
        "start_of_jpeg": (b"\xff\xd8\xff", HEADER),
        "start_of_png": (made.SIGNATURE, HEADER),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", UNKNOWN),
        "pdf_with_jpeg": (b"%PDF-1.7\n" + JPEG, UNKNOWN),
        "gif_of_script": (b"GIF89a=1;alert(1)//" + bytes(64), HEADER),
        "jpeg_with_zip": (JPEG + b"PK\x03\x04" + bytes(100) + b"<script>", GOOD),
        "png_crc_wrong": (made.PNG.replace(b"IDAT", b"IDAt", 1), CORRUPT),
        "png_of_no_width": (made.png(0, 10), HEADER),
        "png_huge": (made.png(60_000, 60_000, data=b"x"), PIXELS),
        "png_bomb": (made.png(30_000, 30_000, bits=1, data=made.zipped_zeros(113 << 20)), PIXELS),
        "png_text_bomb": (made.png(64, 64, made.chunk(b"zTXt", b"k\0\0" + made.zipped_zeros(300 << 20))), GOOD),
        "png_profile_bomb": (made.png(64, 64, made.chunk(b"iCCP", b"k\0\0" + made.zipped_zeros(300 << 20))), GOOD),
        "png_pixels_beyond": (made.png(64, 64, data=made.zipped_zeros(300 << 20)), GOOD),
        "gif_huge": (made.gif_of_size(65_535, 65_535), PIXELS),
        "gif_of_100_000_frames": (made.gif_of_frames(100_000), ("refused", "too_many_frames")),
        "jpeg_huge": (made.jpeg_of_size(65_000, 65_000), PIXELS),
        "jpeg_wrong_size": (made.jpeg_of_size(900, 900), CORRUPT),
        "jpeg_of_segments": (made.jpeg_with_segments(60), GOOD),
        "jpeg_of_scans": (made.jpeg_of_scans(3000, 400), ("undecodable", "decoder_timeout")),
        "webp_huge": (made.webp_of_size(16_384, 16_384), PIXELS),
        "bmp_huge": (made.bmp_of_size(40_000, 40_000), PIXELS),
        "bmp_negative": (made.bmp_of_size(-1, 20), HEADER),
        "png_of_4_billion": (made.png(0xFFFFFFFF, 0xFFFFFFFF, data=b"x"), HEADER),
        "tiff_bites_its_tail": (made.tiff_that_bites_its_tail(), CORRUPT),
    }
    return [Kind(f"body_{name}", *end, [ok(body)]) for name, (body, end) in bodies.items()]


def _captions() -> list[Kind]:
    good = {
        "empty": b"",
        "nul": b"a\0b\0",
        "right_to_left": "\u202eexe.gpj \u2067שלום\u2069 مرحبا".encode(),
        "combining": ("z" + "\u0301\u0328" * 5000).encode(),
        "emoji": "👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈".encode(),
        "path": b"../../../etc/passwd",
        "json": b'"}, {"key": "00000", "status": "ok"}\r\n',
        "lines": b"one\r\ntwo\n\x1b[31mred\x07",
        "byte_order_mark": "\ufeffmark".encode(),
        "of_1_mb": ("ü" * (1 << 19)).encode(),
    }
    bad = {
        "not_utf8": b"\xff\xfe caf\xe9",
        "surrogate": b"\xed\xa0\x80",
        "overlong": b"\xc0\xaf",
        "cut": "ü".encode()[:1],
    }
    return [
        *(Kind(f"caption_{name}", *GOOD, [ok(JPEG)], caption=caption) for name, caption in good.items()),
        *(
            Kind(f"caption_{name}", "filtered", "caption_not_utf8", [ok(JPEG)], caption=caption)
            for name, caption in bad.items()
        ),
        Kind("caption_null", "filtered", "caption_missing", [ok(JPEG)], caption=None),
    ]


@cache
def kinds() -> tuple[Kind, ...]:
    """All of them; packing the bombs takes seconds."""
    return (*_refused_urls(), *_odd_urls(), *_redirects(), *_answers(), *_bodies(), *_captions())


NAMES = {
    "good.test": ["127.0.1.200"],
    "loopback.test": ["127.0.0.1"],
    "localhost": ["127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "half.test": ["127.0.1.201", "10.0.0.1"],
}
