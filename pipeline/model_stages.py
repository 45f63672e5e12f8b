"""The stages that train and use models: clip, prior, decoder, upsamplers, samples, report."""

from typing import Any

from cluster.canonical import digest
from pipeline.config import RunConfig
from pipeline.stage import Build

Plain = dict[str, Any]


def clip_settings(config: RunConfig) -> Plain:
    """A CLIP trained here depends on the split too: it learns from rows outside the validation part."""
    clip = config.clip
    if clip.training is None:
        return {"encoder": clip.encoder.content_settings()}
    return {
        "encoder": clip.encoder.content_settings(),
        "training": clip.training.content_settings(),
        "validation_fraction": config.view.validation_fraction,
        "seed": config.seed,
    }


def build_clip(build: Build) -> int:
    clip = build.config.clip
    if clip.training is None:
        payload = {"encoder": clip.encoder.model_dump(mode="json"), "out": build.workshop.plain()}
        build.session.call("embed.load_clip:member", payload, on_report=build.progress.report)
        return 1
    return _train(
        build,
        "clip",
        clip.encoder.model_dump(mode="json"),
        clip.training.model_dump(mode="json"),
        {"validation_fraction": build.config.view.validation_fraction},
    )


def model_settings(section: str, config: RunConfig) -> Plain:
    chosen = getattr(config, section)
    return {
        "model": chosen.model.model_dump(mode="json"),
        "training": chosen.training.content_settings(),
        "seed": config.seed,
    }


def build_model(section: str, family: str, build: Build) -> int:
    chosen = getattr(build.config, section)
    return _train(build, family, chosen.model.model_dump(mode="json"), chosen.training.model_dump(mode="json"), {})


def build_samples(build: Build) -> int:
    payload = {
        "config": build.config.samples.model_dump(mode="json"),
        "seed": build.config.seed,
        "inputs": build.uris(),
        "out": build.workshop.plain(),
    }
    build.session.run_gang("train.sample.stage:member", payload, on_report=build.progress.report)
    return 1


def build_report(build: Build) -> int:
    from pipeline.report import publish_report  # matplotlib: a second to import, and only the last stage draws

    return publish_report(build)


def _train(build: Build, family: str, model: Plain, training: Plain, extra: Plain) -> int:
    payload = {
        "family": family,
        "model": model,
        "training": training,
        "seed": _seed_of(build),
        "inputs": build.uris(),
        "out": build.workshop.plain(),
    } | extra
    build.session.run_gang("train.worker:member", payload, on_report=build.progress.report)
    return 1


def _seed_of(build: Build) -> int:
    """Each model's own seed: with the run's seed alone, decoder and upsamplers would draw the same noise."""
    return int(digest([build.config.seed, build.name])[:8], 16)
