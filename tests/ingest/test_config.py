import pytest
from pydantic import ValidationError

from ingest.config import ImagesConfig
from ingest.source_config import EvaluationSetConfig, ScenesConfig, SourceConfig


def test_a_source_is_a_table_or_scenes_never_both():
    assert SourceConfig().pairs is None
    assert SourceConfig(scenes=ScenesConfig()).scenes == ScenesConfig()
    with pytest.raises(ValidationError, match="one source"):
        SourceConfig(pairs="t.parquet", scenes=ScenesConfig())


@pytest.mark.parametrize("given", [{}, {"pairs": "t.csv", "folder": "f"}, {"folder": "f", "scenes": "copies"}])
def test_an_evaluation_set_is_in_exactly_one_place(given: dict[str, str]):
    with pytest.raises(ValidationError, match="exactly one"):
        EvaluationSetConfig(name="e", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b"])
def test_an_evaluation_sets_name_is_a_folders_name(name: str):
    with pytest.raises(ValidationError):
        EvaluationSetConfig(name=name, folder="f")


def test_a_network_that_is_none_is_named_with_the_remedy():
    with pytest.raises(ValidationError, match=r"'10\.0\.0\.1/8' is not a network .*write 10\.0\.0\.0/8"):
        ImagesConfig(allow_networks=("10.0.0.1/8",))


def test_by_default_nothing_is_filtered_and_no_private_network_is_allowed():
    config = ImagesConfig()
    assert not config.filters.judge_pairs and not config.filters.picture_filters
    assert (config.filters.min_side, config.filters.max_aspect_ratio, config.filters.min_contrast) == (None, None, None)
    assert config.filters.blocked_images is None
    assert config.allow_networks == ()
    assert set(config.accept) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}


def test_patience_and_concurrency_are_no_content():
    changed = ImagesConfig(concurrency=3, decode_processes=1, deadline_s=1, attempts=1, user_agent="x")
    assert changed.content_settings() == ImagesConfig().content_settings()
    assert ImagesConfig(size=64).content_settings() != ImagesConfig().content_settings()
    assert ImagesConfig(**ImagesConfig().model_dump(mode="json")) == ImagesConfig()
