"""`unclip plan`: what a recipe would build, told without building anything."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import Folder
from pipeline.config import RunConfig
from pipeline.sources import RunSources
from pipeline.stages import stages_of

Plain = dict[str, Any]


def plan_of(config: RunConfig) -> Plain:
    """{"stages": [{"name", "inputs"}], "models": [{"name", "parameters", …}]}."""
    stages = stages_of(config, RunSources(config, Folder(".")))
    return {
        "stages": [{"name": stage.name, "inputs": list(stage.inputs)} for stage in stages],
        "models": _models(config),
    }


def print_plan(planned: Plain) -> None:
    console = Console(highlight=False)
    console.print("stages: " + " → ".join(stage["name"] for stage in planned["stages"]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (
        ("model", "left"),
        ("parameters", "right"),
        ("steps", "right"),
        ("batch", "right"),
        ("rows seen", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for model in planned["models"]:
        steps, batch = model["steps"], model["batch_size"]
        table.add_row(
            model["name"],
            f"{model['parameters']:,}",
            f"{steps:,}" if steps else "loaded",
            f"{batch:,}" if batch else "",
            f"{steps * batch:,}" if steps and batch else "",
        )
    console.print(table)


def _models(config: RunConfig) -> list[Plain]:
    """Parameter counts on torch's meta device: Table 3's models take no memory here."""
    from embed.clip import clip_parameter_count
    from train.families.facts import parameter_count, shape_facts

    facts = shape_facts(config.clip.encoder)
    training = config.clip.training
    models: list[Plain] = [
        {"name": "clip", "parameters": clip_parameter_count(config.clip.encoder)} | _training(training)
    ]
    for name, family in (
        ("prior", "prior_diffusion"),
        ("decoder", "decoder"),
        ("upsampler_256", "upsampler"),
        ("upsampler_1024", "upsampler"),
    ):
        section = getattr(config, name)
        models.append(
            {"name": name, "parameters": parameter_count(family, section.model, facts)} | _training(section.training)
        )
    return models


def _training(training: Any) -> Plain:
    return {
        "steps": training.steps if training else None,
        "batch_size": training.batch_size if training else None,
        "learning_rate": training.learning_rate if training else None,
    }
