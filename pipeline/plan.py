"""`unclip plan`: what a recipe would build and what room it takes, told without building anything.

It works without a source; where the source can be opened, rows, bytes and files of each stage are estimated.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import Folder
from pipeline.config import RunConfig
from pipeline.estimate import StageEstimate, estimate_data, estimate_model, source_rows
from pipeline.sources import RunSources
from pipeline.stages import stages_of
from pipeline.words import bytes_in_words

Plain = dict[str, Any]


def plan_of(config: RunConfig) -> Plain:
    """{"stages": [{"name", "inputs", "rows", "bytes", "files", "scratch_bytes"}], "models": [{"name", "parameters",
    …}], "totals": {…}, "unknown": […]}. `scratch_bytes` are checkpoints while the stage runs."""
    sources = RunSources(config, Folder("."))
    rows, unknown = source_rows(config, sources)
    models = _models(config)
    estimates = estimate_data(config, rows)
    estimates |= {model["name"]: estimate_model(model["parameters"], trained=bool(model["steps"])) for model in models}
    stages: list[Plain] = [
        {"name": stage.name, "inputs": list(stage.inputs), **estimates.get(stage.name, StageEstimate()).plain()}
        for stage in stages_of(config, sources)
    ]
    totals = {
        "bytes": sum(stage["bytes"] or 0 for stage in stages),
        "files": sum(stage["files"] or 0 for stage in stages),
        "scratch_bytes": max(stage["scratch_bytes"] for stage in stages),
    }
    return {"stages": stages, "models": models, "totals": totals, "unknown": unknown}


def print_plan(planned: Plain) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge
    _print_stages(console, planned)
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


def _print_stages(console: Console, planned: Plain) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (
        ("stage", "left"),
        ("rows up to", "right"),
        ("bytes", "right"),
        ("files", "right"),
        ("while it trains", "right"),
        ("made from", "left"),
    ):
        table.add_column(title, justify=justify, no_wrap=title != "made from")  # type: ignore[arg-type]
    for stage in planned["stages"]:
        table.add_row(
            stage["name"],
            f"{stage['rows']:,}" if stage["rows"] is not None else "",
            bytes_in_words(stage["bytes"]) if stage["bytes"] is not None else "",
            f"{stage['files']:,}" if stage["files"] is not None else "",
            f"+ {bytes_in_words(stage['scratch_bytes'])}" if stage["scratch_bytes"] else "",
            _inputs_in_words(stage["inputs"]),
        )
    console.print(table)
    totals = planned["totals"]
    console.print(
        f"about {bytes_in_words(totals['bytes'])} in {totals['files']:,} files, and "
        f"{bytes_in_words(totals['scratch_bytes'])} more for a while: room to make, if every row's picture arrives.",
        soft_wrap=True,
    )
    for why in planned["unknown"]:
        console.print(f"rows not known: {why}", soft_wrap=True, markup=False)
    console.print()


def _inputs_in_words(inputs: list[str]) -> str:
    """Inputs of evaluation sets are told once for all sets."""
    words = [
        name if not name.startswith("evaluation/") else f"evaluation/*/{name.rsplit('/', 1)[1]}" for name in inputs
    ]
    return " ".join(dict.fromkeys(words))


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
