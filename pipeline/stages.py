"""What a run builds, in order. Reads like the figure in docs/architecture.md.

A stage's inputs are named by their folder under the run; an evaluation set goes the same way as the training pairs,
under `evaluation/<name>/`, up to its embeddings.
"""

from functools import partial

from pipeline import data_stages, model_stages
from pipeline.config import RunConfig
from pipeline.sources import RunSources
from pipeline.stage import Stage


def stages_of(config: RunConfig, sources: RunSources) -> list[Stage]:
    """Every stage of the run, each after what it reads."""
    sets = [f"evaluation/{item.name}" for item in config.evaluation_sets]
    set_pairs, set_images = [f"{name}/pairs" for name in sets], [f"{name}/images" for name in sets]
    set_embeddings = tuple(f"{name}/embeddings" for name in sets)
    cached = ("images", "clip", "embeddings", "view", "pca")
    models = ("prior", "decoder", "upsampler_256", "upsampler_1024")

    def pairs(name: str) -> Stage:
        return Stage(
            name, 2, (), partial(data_stages.pairs_settings, sources, name), partial(data_stages.build_pairs, sources)
        )

    def images(name: str, pairs_name: str) -> Stage:
        return Stage(
            name,
            2,
            (pairs_name,),
            partial(data_stages.images_settings, sources, pairs_name),
            partial(data_stages.build_images, sources),
        )

    def embeddings(name: str, images_name: str) -> Stage:
        return Stage(
            name, 1, (images_name, "clip"), lambda c: c.embeddings.content_settings(), data_stages.build_embeddings
        )

    return [
        pairs("pairs"),
        images("images", "pairs"),
        *(pairs(name) for name in set_pairs),
        *(images(name, name_of_pairs) for name, name_of_pairs in zip(set_images, set_pairs, strict=True)),
        Stage("clip", 1, ("images",), model_stages.clip_settings, model_stages.build_clip),
        embeddings("embeddings", "images"),
        *(embeddings(name, name_of_images) for name, name_of_images in zip(set_embeddings, set_images, strict=True)),
        Stage(
            "dedup",
            1,
            ("embeddings", *set_images, *set_embeddings),
            lambda c: c.dedup.content_settings(),
            data_stages.build_dedup,
        ),
        Stage("view", 1, ("embeddings", "dedup"), lambda c: c.view.model_dump(mode="json"), data_stages.build_view),
        Stage("pca", 1, ("embeddings", "view"), lambda c: c.pca.model_dump(mode="json"), data_stages.build_pca),
        Stage(
            "prior",
            1,
            cached,
            partial(model_stages.model_settings, "prior"),
            partial(model_stages.build_model, "prior", "prior_diffusion"),
        ),
        Stage(
            "decoder",
            1,
            cached,
            partial(model_stages.model_settings, "decoder"),
            partial(model_stages.build_model, "decoder", "decoder"),
        ),
        Stage(
            "upsampler_256",
            1,
            cached,
            partial(model_stages.model_settings, "upsampler_256"),
            partial(model_stages.build_model, "upsampler_256", "upsampler"),
        ),
        Stage(
            "upsampler_1024",
            1,
            cached,
            partial(model_stages.model_settings, "upsampler_1024"),
            partial(model_stages.build_model, "upsampler_1024", "upsampler"),
        ),
        Stage(
            "samples",
            1,
            ("clip", "pca", "embeddings", "view", *set_embeddings, *models),
            lambda c: {"seed": c.seed} | c.samples.model_dump(mode="json"),
            model_stages.build_samples,
        ),
        Stage(
            "report",
            1,
            (
                "pairs",
                "images",
                "clip",
                "embeddings",
                *set_images,
                *set_embeddings,
                "dedup",
                "view",
                "pca",
                *models,
                "samples",
            ),
            lambda c: c.report.model_dump(mode="json"),
            model_stages.build_report,
        ),
    ]


def upstream_of(stages: list[Stage], name: str) -> set[str]:
    """Every stage that `name` rests on, near and far."""
    inputs = {stage.name: stage.inputs for stage in stages}
    found: set[str] = set()
    waiting = list(inputs[name])
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += inputs[current]
    return found


def until_stage(stages: list[Stage], name: str) -> list[Stage]:
    """The stages that building `name` takes, and no other."""
    needed = upstream_of(stages, name) | {name}
    return [stage for stage in stages if stage.name in needed]
