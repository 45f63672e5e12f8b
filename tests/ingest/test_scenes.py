import itertools

import numpy as np
import pytest
from PIL import Image

from ingest import scenes
from ingest.scenes import Scene, Thing, draw, parse_caption

COUNT = 4000


def training(count: int = COUNT) -> list[Scene]:
    return [scenes.training_scene(0, index) for index in range(count)]


def heldout_captions() -> list[Scene]:
    return [scenes.heldout_caption_scene(0, index, training_count=COUNT) for index in range(128)]


def heldout_pairs() -> list[Scene]:
    return [scenes.heldout_pair_scene(0, index) for index in range(128)]


def test_a_caption_says_all_attributes_and_parses_back():
    for scene in [*training(500), *heldout_captions(), *heldout_pairs()]:
        assert parse_caption(scene.caption) == scene
    assert parse_caption("a small red circle above a large blue square on a green background") == Scene(
        (Thing("small", "red", "circle"), Thing("large", "blue", "square")), "above", "green"
    )
    assert parse_caption("a large yellow star at the top left on a white background").placement == "at the top left"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a large red circle on a white background",
        "a large red circle above on a white background",
        "a large red circle in the centre on a pink background",
        "a large red blob in the centre on a white background",
        "a large red circle near a small blue star on a white background",
        "a large red circle in the centre on a white background ",
    ],
)
def test_what_the_grammar_does_not_make_does_not_parse(caption: str):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(caption)


def test_equal_indices_give_equal_pictures_and_others_differ():
    first, again = (draw(scenes.training_scene(7, 3), 64).tobytes() for _ in range(2))
    assert first == again
    assert len({draw(scene, 64).tobytes() for scene in training(300)}) == 300
    assert draw(scenes.training_scene(8, 3), 64).tobytes() != first


def test_training_is_mostly_one_large_object():
    things = [len(scene.things) for scene in training()]
    assert 0.6 < things.count(1) / COUNT < 0.8
    assert sum(scene.dominant.size == "large" for scene in training()) > 0.8 * COUNT
    assert len({scene.caption for scene in training()}) > 1000


def test_heldout_captions_are_new_combinations_of_seen_pairs():
    seen_captions = {scene.caption for scene in training()}
    seen_pairs = set().union(*(scene.attribute_pairs for scene in training()))
    for scene in heldout_captions():
        assert scene.caption not in seen_captions
        assert scene.attribute_pairs <= seen_pairs


def test_heldout_pairs_are_never_seen_in_training():
    seen_pairs = set().union(*(scene.attribute_pairs for scene in training()))
    for scene in heldout_pairs():
        assert scene.attribute_pairs - seen_pairs


def test_every_single_attribute_is_seen_in_training():
    seen = {(thing.colour, thing.shape) for scene in training() for thing in scene.things}
    everything = set(itertools.product(scenes.SHAPE_COLOURS, scenes.SHAPES))
    assert everything - seen == scenes.HELDOUT_COLOUR_SHAPE
    assert {scene.background for scene in training()} == set(scenes.BACKGROUND_COLOURS)


def test_about_half_of_copies_come_from_training_with_every_transform():
    copies = [scenes.copy_scene(0, index, training_count=COUNT, copied_share=0.5) for index in range(64)]
    copied = [copy for copy in copies if copy.training_index is not None]
    assert len(copied) == 32
    assert {copy.transform for copy in copied} == set(scenes.TRANSFORMS)
    for copy in copied:
        assert copy.training_index is not None and copy.transform is not None
        assert copy.scene == scenes.training_scene(0, copy.training_index)
        changed = scenes.transformed(draw(copy.scene, 64), copy.transform)
        assert changed.size == ((32, 32) if copy.transform == "shrink" else (64, 64))
        assert changed.tobytes() != draw(copy.scene, 64).tobytes()
    training_captions = {scene.caption for scene in training()}
    assert not any(copy.scene.caption in training_captions for copy in copies if copy.training_index is None)


def nearest(colour: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: float(np.square(colour - np.array(table[name])).sum()))


def read_back(picture: Image.Image) -> tuple[str, str, tuple[float, float]]:
    """Background colour, dominant colour and its centre, from pixels alone."""
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).astype(float)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = nearest(np.median(edge, axis=0), scenes.BACKGROUND_COLOURS)
    shapes = {name: colour for name, colour in scenes.SHAPE_COLOURS.items() if name != background}
    palette = {**shapes, "background": scenes.BACKGROUND_COLOURS[background]}
    labels = np.array([[nearest(pixel, palette) for pixel in row] for row in pixels])
    names, counts = np.unique(labels[labels != "background"], return_counts=True)
    colour = str(names[counts.argmax()])
    rows, columns = np.nonzero(labels == colour)
    return background, colour, (columns.mean() / 31, rows.mean() / 31)


def test_an_oracle_reads_colours_and_place_from_pixels():
    for scene in training(150):
        background, colour, (x, y) = read_back(draw(scene, 256))
        assert (background, colour) == (scene.background, scene.dominant.colour), scene.caption
        for value, wanted in zip((x, y), scene.dominant_position, strict=True):
            if wanted:
                assert (value - 0.5) * wanted > 0.02, scene.caption
