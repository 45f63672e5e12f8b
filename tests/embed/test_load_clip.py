from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from cluster.errors import UserError
from cluster.workshop import Workshop
from embed.clip import build_clip, load_encoder
from embed.config import EncoderConfig
from embed.load_clip import member

Make = Callable[[str, str], Workshop]


def load(workshop: Workshop, architecture: dict[str, Any] | str, weights: Path | str) -> str:
    encoder = EncoderConfig(architecture=architecture, weights=str(weights)).model_dump(mode="json")
    member({"encoder": encoder, "out": workshop.plain()}, lambda report: None)
    return workshop.publish(1).uri


def test_safetensors_and_checkpoint_of_the_same_weights_make_the_same_artifact(
    tmp_path: Path, workshop: Make, tiny_clip: dict[str, Any]
) -> None:
    model = build_clip(tiny_clip)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "b.pt")
    one = load(workshop("one", "clip"), tiny_clip, tmp_path / "a.safetensors")
    other = load(workshop("other", "clip"), tiny_clip, tmp_path / "b.pt")
    for name in ("model.safetensors", "encoder.json"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes()
    pixels_BHWC = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(load_encoder(one).encode_image(pixels_BHWC), load_encoder(other).encode_image(pixels_BHWC))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_does_not_run(
    tmp_path: Path, workshop: Make, tiny_clip: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"x": Malicious()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load(workshop("clip", "clip"), tiny_clip, tmp_path / "evil.pt")
    assert "this ran" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused_with_the_tensors_that_do_not_fit(
    tmp_path: Path, workshop: Make, tiny_clip: dict[str, Any]
) -> None:
    larger = {**tiny_clip, "vision_cfg": {**tiny_clip["vision_cfg"], "image_size": 48}}
    save_file(build_clip(larger).state_dict(), tmp_path / "larger.safetensors")
    with pytest.raises(UserError, match=r"visual\.positional_embedding is \(37, 48\) where \(17, 48\) is needed"):
        load(workshop("clip", "clip"), tiny_clip, tmp_path / "larger.safetensors")


@pytest.mark.parametrize("data", [b"", b"not weights", b"\x80\x02K\x01."])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_files_that_are_no_weights_are_refused(
    tmp_path: Path, workshop: Make, tiny_clip: dict[str, Any], name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        load(workshop("clip", "clip"), tiny_clip, tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path, workshop: Make, tiny_clip: dict[str, Any]) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load(workshop("clip", "clip"), tiny_clip, tmp_path / "script.pt")


def test_an_unknown_tag_lists_the_known_ones(workshop: Make) -> None:
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        load(workshop("clip", "clip"), "ViT-B-32", "laion-of-nowhere")


def test_a_tag_that_was_trained_with_another_activation_names_the_architecture_to_use(workshop: Make) -> None:
    with pytest.raises(UserError, match="-quickgelu"):
        load(workshop("clip", "clip"), "ViT-B-32", "openai")


def test_a_compact_vocabulary_cannot_be_loaded_from_elsewhere(tiny_clip: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need 'full'"):
        EncoderConfig(architecture=tiny_clip, weights="w.safetensors", vocabulary="captions")
