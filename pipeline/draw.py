"""`unclip sample`: pictures from captions with the models that a run has published. No Ray is needed for it."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cluster.artifact import Artifact
from cluster.errors import UserError
from cluster.storage import Folder
from pipeline.config import parse_config
from pipeline.runner import stored_config

MODELS = ("clip", "pca", "prior", "decoder", "upsampler_256", "upsampler_1024")


def draw(folder: Folder, captions: list[str], out: Path, seed: int) -> None:
    """Write a grid of one picture a caption to `out`."""
    config = parse_config(stored_config(folder), f"{folder.uri}/run.json")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {str(out)!r}: the grid is a PNG; name a file that ends in .png.")
    if not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}.")
    if empty := [number for number, caption in enumerate(captions, 1) if not caption.strip()]:
        raise UserError(f"caption {empty[0]} is empty.")
    inputs = {name: Artifact.open(folder / name).uri for name in MODELS}
    payload = {
        "config": config.samples.model_dump(mode="json"),
        "captions": captions,
        "seed": seed,
        "inputs": inputs,
        "out": str(out),
    }
    from train.sample.stage import sample_captions

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sampling", total=None)
        sample_captions(payload, lambda report: progress.update(task, completed=report["done"], total=report["total"]))
