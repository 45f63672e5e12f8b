import hashlib
import io
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from cluster.errors import UserError
from ingest.blocklists import read_block_lists
from ingest.decode import decode
from ingest.decode_config import DecodeConfig, FiltersConfig
from ingest.filters import Filters
from ingest.filters_identity import filters_identity
from ingest.outcome import Status
from ingest.perceptual import perceptual_hash


def made(**settings: object) -> Filters:
    config = FiltersConfig(**settings)  # type: ignore[arg-type]
    return Filters(config, read_block_lists(config))


def listed(folder: Path, text: str | bytes) -> str:
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def packed(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def smooth(seed: int = 0, height: int = 120, width: int = 160) -> np.ndarray:
    """A picture with large shapes, as photographs have them."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def why(body: bytes, caption: str = "c", **settings: object) -> str | None:
    config = FiltersConfig(**settings)  # type: ignore[arg-type]
    decoded = decode(
        body, DecodeConfig(size=32, filters=config), Filters(config, read_block_lists(config)), "u", caption
    )
    assert (decoded.outcome.status == Status.FILTERED) == (decoded.outcome.reason is not None)
    return decoded.outcome.reason


def test_nothing_is_filtered_unless_it_is_asked_for():
    filters = made()
    for caption in ("", "x", "Photographed on 3 May 2001", "собака", "x" * 1_000_000, "\0\udc80\u202e"):
        assert filters.pair("http://a.example/x", caption) is None
    assert why(packed(np.zeros((40, 40, 3), np.uint8))) is None
    assert not FiltersConfig().judge_pairs and not FiltersConfig(min_side=3, picture_filters=("a:b",)).judge_pairs
    assert FiltersConfig(boilerplate=True).judge_pairs


def test_captions_too_short_and_too_long():
    filters = made(min_caption_characters=3, max_caption_characters=5)
    assert [filters.pair("u", "é" * length) for length in (2, 3, 5, 6)] == [
        "caption_too_short",
        None,
        None,
        "caption_too_long",
    ]


BOILERPLATE = [
    "Photographed on 12 May 2013",
    "photographed on May 3, 2019",
    "IMG_2034.JPG",
    "DSC 0123",
    "my-cat.png",
    "  Image  ",
    "no image available",
    "Click here",
    "click to enlarge",
    "Copyright 2014 somebody",
    "Privacy policy",
    "https://a.example/c.jpg",
    "12-34",
    "",
    "…!",
]
DESCRIPTIONS = [
    "a photo of a cat",
    "Logo design for a coffee shop",
    "A dog taken on the beach",
    "Golden Gate Bridge © 2014",
    "Untitled (2003) by an unknown painter",
    "一只狗在海滩上奔跑",
    "image 一只狗",
    "Собака бежит по пляжу",
    "كلب يركض على الشاطئ",
]


def test_boilerplate_goes_and_descriptions_in_any_script_stay():
    filters = made(boilerplate=True)
    assert {caption: filters.pair("u", caption) for caption in BOILERPLATE} == dict.fromkeys(
        BOILERPLATE, "caption_boilerplate"
    )
    assert {caption: filters.pair("u", caption) for caption in DESCRIPTIONS} == dict.fromkeys(DESCRIPTIONS)


def test_patterns_of_the_user_are_added_and_take_linear_time():
    filters = made(boilerplate_patterns=("(a+)+$b", "(x*)*zy", "best price"))
    begun = time.process_time()
    assert filters.pair("u", "a" * 1_000_000) is None
    assert filters.pair("u", "x" * 1_000_000) is None
    assert time.process_time() - begun < 1
    assert filters.pair("u", "The BEST price") == "caption_boilerplate"
    assert filters.pair("u", "Photographed on 12 May 2013") is None
    with pytest.raises(UserError, match="no pattern in RE2's syntax"):
        made(boilerplate_patterns=("(?<=a)b",))


def test_captions_in_other_languages_go():
    filters = made(languages=("en",))
    foreign = [
        "Ein Hund läuft am Strand entlang",
        "Un chien court sur la plage",
        "Un perro corriendo en la playa",
        "Собака бежит по пляжу",
        "一只狗在海滩上奔跑",
        "كلب يركض على الشاطئ",
    ]
    english = ["A dog running on the beach", "Wooden table and chairs", "Portrait of a young woman smiling", "12-34"]
    assert [filters.pair("u", caption) for caption in foreign] == ["caption_language"] * len(foreign)
    assert [filters.pair("u", caption) for caption in english] == [None] * len(english)
    two = made(languages=("en", "de"))
    assert two.pair("u", foreign[0]) is None and two.pair("u", foreign[1]) == "caption_language"
    begun = time.process_time()
    assert filters.pair("u", "a dog running on the beach " * 40_000) is None
    assert time.process_time() - begun < 1
    with pytest.raises(UserError, match="'english'"):
        made(languages=("english",))


def test_blocked_urls_are_found_in_any_spelling(tmp_path: Path):
    filters = made(blocked_urls=listed(tmp_path, "# bad\n\nhttp://Bad.example:80/a%7Eb/../c?x=1#there\n"))
    for url in ("http://bad.example/c?x=1", "https://BAD.example./c?x=1", "http://u@bad.example/%63?x=1#else"):
        assert filters.pair(url, "c") == "blocked_url", url
    for url in (
        "http://bad.example/c?x=2",
        "http://bad.example/C?x=1",
        "http://good.example/c?x=1",
        "",
        "::",
        "\udc80",
    ):
        assert filters.pair(url, "c") is None, url


def test_blocked_domains_mean_what_lies_below_them(tmp_path: Path):
    filters = made(blocked_domains=listed(tmp_path, "bad.example\n*.müller.example\n1.2.3.4\n"))
    for url in (
        "http://bad.example/x",
        "https://IMG.cdn.Bad.Example:8080/x",
        "http://xn--mller-kva.example/",
        "http://a.müller.example/",
        "http://1.2.3.4/x",
    ):
        assert filters.pair(url, "c") == "blocked_domain", url
    for url in (
        "http://notbad.example/",
        "http://bad.example.org/",
        "http://example/bad.example",
        "bad.example",
        "http://",
    ):
        assert filters.pair(url, "c") is None, url
    with pytest.raises(UserError, match=r"line 2.*'http://a.example/x' is not a domain"):
        made(blocked_domains=listed(tmp_path, "a.example\nhttp://a.example/x\n"))


def test_blocked_words_and_phrases_are_whole_words(tmp_path: Path):
    filters = made(blocked_captions=listed(tmp_path, "Very bad\n猫\nＦＯＯ\n"))
    for caption in ("so VERY, bad!", "very\nbad", "猫", "a foo"):
        assert filters.pair("u", caption) == "blocked_caption", caption
    for caption in ("very badly", "every bad", "very", "bad very", "food", ""):
        assert filters.pair("u", caption) is None, caption
    assert filters.pair("u", "very " * 200_000 + "bad") == "blocked_caption"


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_blocked_files_are_not_even_opened(tmp_path: Path, kind: str):
    picture, other = packed(smooth(0)), packed(smooth(1))
    listing = (
        f"# known\n{hashlib.new(kind, picture).hexdigest().upper()}\n{hashlib.new(kind, b'no picture').hexdigest()}\n"
    )
    uri = listed(tmp_path, listing)
    assert why(picture, blocked_images=uri) == "blocked_image"
    assert why(b"no picture", blocked_images=uri) == "blocked_image"
    assert why(other, blocked_images=uri) is None


def reference_hash(pixels: np.ndarray) -> int:
    """As imagehash's phash, with the area average for its Lanczos."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    height, width = grey.shape
    small = grey.reshape(32, height // 32, 32, width // 32).mean(axis=(1, 3))
    low = scipy.fft.dctn(small, type=2)[:8, :8]
    return int("".join("1" if bit else "0" for bit in (low > np.median(low)).ravel()), 2)


def differing(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_the_perceptual_hash_is_phash():
    for seed in range(5):
        pixels = smooth(seed, 128, 160)
        thumbnail = pixels.reshape(32, 4, 32, 5, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        assert differing(perceptual_hash(thumbnail), reference_hash(pixels)) <= 2


def test_copies_of_a_blocked_picture_are_blocked_whatever_their_size_quality_and_crop(tmp_path: Path):
    original = smooth(0, 320, 480)
    uri = listed(tmp_path, f"{reference_hash(original):016x}\n")
    small = np.asarray(Image.fromarray(original).resize((300, 200), Image.Resampling.LANCZOS))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = packed(np.rot90(original), "JPEG", exif=exif)  # shown as the original
    for body in (packed(original), packed(small, "JPEG", quality=60), packed(original, "WEBP"), turned):
        assert why(body, blocked_images=uri) == "blocked_image"
    assert why(packed(original), blocked_images=uri, blocked_image_distance=0) in (None, "blocked_image")
    assert [why(packed(smooth(seed, 320, 480)), blocked_images=uri) for seed in range(1, 8)] == [None] * 7


def test_a_block_list_that_makes_no_sense_is_told_with_its_line(tmp_path: Path):
    with pytest.raises(UserError, match="blocked_images, line 3: 'abc' is not 32, 40 or 64"):
        made(blocked_images=listed(tmp_path, "# x\n\nabc\n"))
    with pytest.raises(UserError, match=r"line 1: 'zz+"):
        made(blocked_images=listed(tmp_path, "z" * 32))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        made(blocked_captions=listed(tmp_path, b"fine\n\xff\xfe\n"))
    with pytest.raises(UserError, match=r"blocked_domains: .*/absent cannot be read"):
        made(blocked_domains=str(tmp_path / "absent"))


def test_pictures_of_one_colour_go():
    flat = np.full((100, 100, 3), 200, np.uint8)
    speckled = flat.copy()
    speckled[::20, ::20] = 190
    assert why(packed(flat), min_contrast=8) == why(packed(speckled), min_contrast=8) == "near_constant"
    blue = flat.copy()
    blue[:50, :, 2] = 100
    assert why(packed(blue), min_contrast=8) is None and why(packed(smooth()), min_contrast=8) is None


def test_sides_and_aspect_ratio_are_those_of_the_upright_original():
    body = packed(smooth(0, 40, 90))
    assert why(body, min_side=41) == "too_small" and why(body, min_side=40) is None
    assert why(body, max_aspect_ratio=2) == "aspect_ratio" and why(body, max_aspect_ratio=2.25) is None


OWN = """
def no_cats(url, caption):
    return "has_cat" if "cat" in caption else None

def dark(pixels, url, caption):
    assert pixels.shape == (32, 32, 3) and pixels.dtype == "uint8"
    return "too_dark" if pixels.mean() < 50 else None

def vandal(pixels, url, caption):
    pixels[:] = 0

def chatty(url, caption):
    return "This is a long story"

number = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    about = tmp_path / "site" / "own_filters-1.2.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site" / "own_filters.py").write_text(OWN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-filters\nVersion: 1.2\n")
    (about / "RECORD").write_text("own_filters.py,,\n")
    (about / "INSTALLER").write_text("pip\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return about


def test_filters_of_the_user_say_their_own_reasons(installed: Path):
    filters = made(pair_filters=("own_filters:no_cats",))
    assert filters.pair("u", "a cat") == "has_cat" and filters.pair("u", "a dog") is None
    dark, light = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 200, np.uint8)
    assert why(packed(dark), picture_filters=("own_filters:dark",)) == "too_dark"
    assert why(packed(light), picture_filters=("own_filters:dark",)) is None


def test_a_filter_that_fails_lets_nothing_in_and_says_once_how(installed: Path):
    light = packed(np.full((40, 40, 3), 200, np.uint8))
    assert why(light, picture_filters=("own_filters:vandal",)) == "vandal_failed"
    filters = made(pair_filters=("own_filters:chatty",))
    assert [filters.pair("u", "c") for _ in range(3)] == ["chatty_failed"] * 3
    (told,) = filters.failures()
    assert "own_filters:chatty" in told and "a long story" in told
    assert filters.pair("u", "c") == "chatty_failed" and filters.failures() == []


def test_identity_holds_what_lists_say_and_versions_of_packages(installed: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("bad.example\n")
    (tmp_path / "b.txt").write_text("bad.example\n")
    a, b = (FiltersConfig(blocked_domains=str(tmp_path / name), min_side=9) for name in ("a.txt", "b.txt"))
    assert filters_identity(a) == filters_identity(b) and filters_identity(a)["min_side"] == 9
    (tmp_path / "b.txt").write_text("worse.example\n")
    assert filters_identity(a) != filters_identity(b)
    own = FiltersConfig(pair_filters=("own_filters:no_cats",))
    assert filters_identity(own)["pair_filters"] == ["own_filters:no_cats of own-filters 1.2"]
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own-filters\nVersion: 1.3\n")
    assert filters_identity(own)["pair_filters"] == ["own_filters:no_cats of own-filters 1.3"]


def test_filters_come_from_installed_packages_only(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lying_about.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for setting, path, wrong in [
        ("pair_filters", "lying_about:no_cats", "no installed package has a module 'lying_about'"),
        ("picture_filters", "own_filters.py", "write package.module:function"),
        ("picture_filters", "os.path:../x", "write package.module:function"),
    ]:
        with pytest.raises(UserError, match=wrong):
            filters_identity(FiltersConfig(**{setting: (path,)}))  # type: ignore[arg-type]
    (installed / "INSTALLER").unlink()  # now like a project that was only built
    with pytest.raises(UserError, match="no installed package"):
        filters_identity(FiltersConfig(pair_filters=("own_filters:no_cats",)))
    for path, wrong in [("own_filters:absent", "cannot be imported"), ("own_filters:number", "is no function but 3")]:
        with pytest.raises(UserError, match=wrong):
            made(pair_filters=(path,))
