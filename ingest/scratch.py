"""A folder on this machine for what passes over a table leave to each other: gone when the block ends.

A driver that was killed could not clean up. The folder's place follows from the workshop alone, so the next run on the
same workshop finds what is left and starts by deleting it.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import UserError
from cluster.workshop import Workshop


@contextmanager
def scratch_folder(workshop: Workshop, name: str) -> Iterator[Path]:
    """Inside the workshop where it is on this machine, else below the system's temporary folder."""
    if workshop.work.local:
        folder = Path(workshop.work.uri) / name
        folder.parent.mkdir(parents=True, exist_ok=True)
    else:
        place = hashlib.sha256(f"{workshop.work.uri}/{name}".encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"unclip-{os.getuid()}-{place}"
    _delete(folder)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    # Others may write into the temporary folder too: what is not our own directory is not ours to delete.
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is in the way and is not a folder of this user. Delete it, or set TMPDIR.")
    shutil.rmtree(folder)
