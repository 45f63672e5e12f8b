"""The libraries that shape bytes, and one digest over their versions.

Only what can change the content of an artifact counts: a new pytest does not make a cache stale.
"""

import functools
import platform
from importlib import metadata

from cluster.canonical import digest

LIBRARIES = (
    "unclip-pipeline",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "google-re2",
    "numpy",
    "open_clip_torch",
    "opencv-python-headless",
    "pillow",
    "py3langid",
    "pyarrow",
    "ray",
    "safetensors",
    "simplejpeg",
    "torch",
    "torchvision",
)


@functools.cache
def environment() -> dict[str, str]:
    """Versions by name: Python, the machine's architecture and the installed ones of `LIBRARIES`."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()}-{platform.machine()}"}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def environment_digest() -> str:
    return digest(environment())
