"""What a person is told after a takedown: what left, who saw it, what follows by itself, what is theirs to do."""

from typing import Any

from rich.console import Console

from pipeline.words import bytes_in_words

Plain = dict[str, Any]
WAYS = {
    "exact": "rows with a URL spelled so",
    "normalised": "rows with another spelling of such a URL",
    "domain": "rows of such a domain",
    "fetched": "rows by the bytes as fetched",
    "stored": "rows by the bytes as stored",
    "pair_id": "rows with such a pair id",
}
NAMES = {"urls": "URLs", "domains": "domains", "image_hashes": "hashes", "pairs": "pair ids"}

FOLLOWS = (
    "On the next `unclip run`, everything built from these rows is built again without them: embeddings, dedup (its "
    "evaluation keys are URLs), view, pca, models, samples and report. Until then those still hold captions and "
    "pictures; after it, `unclip gc` deletes what they were."
)
BY_HAND = (
    "Not reached from here: the source table (a later snapshot keeps the rows out by their pair ids, but the table has "
    "them), tables in {run}/source, exports and copies that were made, samples and reports that were sent, logs of the "
    "cluster and of proxies, backups, and the list that you gave.",
    "A pair id is a URL with one caption: to keep a whole domain, URL or picture out of later snapshots too, name it "
    "in the block-lists of images.filters.",
)


def print_takedown(taken: Plain) -> None:
    console = Console(highlight=False)

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, soft_wrap=True, markup=False)

    what = NAMES[taken["by"]]
    if taken["finished_first"] is not None:
        say(f"Takedown {taken['finished_first']}, which had been killed, was brought to its end first.")
    if "takedown" not in taken:
        _say_nothing_new(say, taken, what)
    else:
        _say_removed(say, taken, what)
        _say_models(say, taken["models"])
        say(FOLLOWS)
        for line in BY_HAND:
            say(line.format(run=taken["run"]))
        if "purged" not in taken:
            say(
                "The files of the earlier revisions STILL HOLD these rows: delete them with --purge (here) or with "
                f"`unclip gc {taken['run']}` (everywhere).",
                "bold yellow",
            )
    if "purged" in taken:
        files, size = (sum(counted[key] for counted in taken["purged"].values()) for key in ("files", "bytes"))
        say(f"Purged: {files:,} superseded files of pairs and images, {bytes_in_words(size)}.")


def _say_nothing_new(say: Any, taken: Plain, what: str) -> None:
    if taken["pairs"]:
        say(f"{taken['run']}: all {taken['pairs']:,} pairs that these {what} mean had been removed before.")
    else:
        say(f"{taken['run']}: none of the {taken['listed']:,} {what} matches a row; nothing was changed.")


def _say_removed(say: Any, taken: Plain, what: str) -> None:
    say(f"{taken['run']}: takedown {taken['takedown']}, {taken['listed']:,} {what}, {taken['pairs']:,} pairs.")
    for name, ways in taken["matched"].items():
        matched = ", ".join(f"{count:,} {WAYS[how]}" for how, count in ways.items() if count)
        if matched:
            say(f"  found in {name}: {matched}")
    for name, amended in taken["artifacts"].items():
        making = amended.get("in_the_making")
        more = f", and {making:,} rows of a revision in the making" if making else ""
        say(f"  removed from {name}: {amended['rows']:,} rows in {amended['shards']:,} shards{more}")
    if not taken["artifacts"]:
        say("  No row has them now; later ingests will leave them out.")


def _say_models(say: Any, models: list[Plain]) -> None:
    if not models:
        say("No model or checkpoint of this run saw a removed row.")
        return
    say("These models and checkpoints saw removed rows, and go on remembering them until they are trained again:")
    for model in models:
        about = "" if model["exact"] else " (counted in the rows as they are now; it was trained on an earlier state)"
        say(f"  {model['model']} {model['at']}: {model['rows']:,} rows{about}", "yellow")
