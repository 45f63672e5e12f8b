"""A folder anywhere fsspec reaches, with the three writes that the artifact protocol is made of.

    write    atomic replacement: a reader sees the old bytes or the new ones
    create   exclusive: the first writer wins and is told so, the others are told that they lost
    settle   a finished file moves from its private name to its public one

On a local disk these are rename, hard link and rename, each followed by an fsync of the folder; on an object store
one PUT, one conditional PUT (`If-None-Match: *`), and a copy.
"""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from cluster.errors import UserError, WorkFailed

CREDENTIALS = re.compile(r"[a-z0-9+]+://[^/@]*:[^/@]*@", re.IGNORECASE)
CONFLICTS = 5
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Folder:
    """A directory at any fsspec URI. Names are relative to it and may contain `/`."""

    def __init__(self, uri: str | Path) -> None:
        if CREDENTIALS.match(str(uri)):
            raise UserError(
                "a URI with credentials in it is refused: they would be stored with the run. Set them in "
                "the environment of every node (AWS_ACCESS_KEY_ID …), or give the nodes a role."
            )
        try:
            filesystem, path = fsspec.core.url_to_fs(str(uri))
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {uri!s}: {error}") from error
        self._path: str = path.rstrip("/")
        self.local: bool = "file" in _protocols(filesystem)
        self.uri: str = self._path if self.local else filesystem.unstrip_protocol(self._path)

    @property
    def _fs(self) -> Any:
        """Asked for each time: fsspec remembers instances, and makes new ones in a forked process, as it must.

        Without its cache of listings, which another process's files would not enter.
        """
        return fsspec.core.url_to_fs(self.uri, use_listings_cache=False)[0]

    def _remote(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call to the store, which tries again by itself a few times. What then fails is an `OSError`."""
        try:
            return getattr(self._fs, method)(*args, **kwargs)
        except OSError:
            raise
        except Exception as error:  # the store's own library has words of its own for a network that is down
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self.uri) from error

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri}/{name}")

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (self.uri,)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    @property
    def name(self) -> str:
        return self._path.rsplit("/", 1)[-1]

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def exists(self, name: str = "") -> bool:
        return os.path.exists(self._at(name)) if self.local else bool(self._remote("exists", self._at(name)))

    def names(self) -> list[str]:
        """The immediate children, sorted; empty where the folder does not exist."""
        try:
            if self.local:
                return sorted(os.listdir(self._path))
            return sorted(_last(path) for path in self._remote("ls", self._path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self) -> list[str]:
        """Those of the immediate children that are folders."""
        try:
            if self.local:
                with os.scandir(self._path) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
            found = self._remote("ls", self._path, detail=True)
            return sorted(_last(entry["name"]) for entry in found if entry["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files_below(self) -> list[str]:
        """Every file at any depth. For small trees; on an object store cheap where there is none, as `names` is not
        (fsspec then lists the parent, to see whether the folder is a file)."""
        if self.local:
            return sorted(
                os.path.relpath(os.path.join(folder, name), self._path)
                for folder, _, names in os.walk(self._path)
                for name in names
            )
        return sorted(str(path)[len(self._path) :].lstrip("/") for path in self._remote("find", self._path))

    def read(self, name: str) -> bytes:
        if not self.local:
            return bytes(self._remote("cat_file", self._at(name)))
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], open(self._at(name), "rb") if self.local else self._remote("open", self._at(name)))

    def size(self, name: str) -> int:
        return int(os.path.getsize(self._at(name)) if self.local else self._remote("size", self._at(name)))

    def write(self, name: str, data: bytes) -> None:
        """Replace the whole file atomically."""
        if not self.local:
            self._remote("pipe_file", self._at(name), data)
            return
        with told_when_full(self.uri), self._private(name) as private:
            private.write_bytes(data)
            _sync_file(private)
            os.replace(private, self._at(name))
            _sync_folder(Path(self._at(name)).parent)

    def create(self, name: str, data: bytes) -> bool:
        """Create the file if nobody has; say whether it was us. Never leaves half a file.

        `data` must be the writer's own (it names an attempt, a process): a store whose answer was lost is asked again,
        and what it then finds there may be what it has just stored for us.
        """
        if not self.local:
            return self._created(name, data)
        with told_when_full(self.uri), self._private(name) as private:
            private.write_bytes(data)
            _sync_file(private)
            try:
                os.link(private, self._at(name))
            except FileExistsError:
                return False
            _sync_folder(Path(self._at(name)).parent)
        return True

    def _created(self, name: str, data: bytes) -> bool:
        for _ in range(CONFLICTS):
            try:
                self._remote("pipe_file", self._at(name), data, mode="create")
                return True
            except OSError as error:
                code = _status_of(error)
                if not isinstance(error, FileExistsError) and code not in (409, 412):
                    raise
            try:
                return self.read(name) == data
            except FileNotFoundError:  # 409: somebody's request was on its way and has come to nothing
                continue
        raise OSError(errno.EBUSY, f"{CONFLICTS} times another writer was at it and left nothing", self._at(name))

    def upload(self, source: Path, name: str) -> None:
        """Bring a finished local file here under `name` (which must be private to the caller), flushed."""
        if not self.local:
            self._remote("put_file", str(source), self._at(name))
            return
        target = Path(self._at(name))
        with told_when_full(self.uri):
            if source != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(source, target)
            _sync_file(target)

    def settle(self, private: str, public: str) -> None:
        """Move a finished file to its public name. Repeatable: a second call finds the work done."""
        try:
            if self.local:
                with told_when_full(self.uri):
                    os.replace(self._at(private), self._at(public))
                    _sync_folder(Path(self._at(public)).parent)
            else:
                self._remote("cp_file", self._at(private), self._at(public))
                self._remote("rm_file", self._at(private))
        except FileNotFoundError:
            if not self.exists(public):
                raise

    def delete(self, name: str = "") -> None:
        """Delete a file or a tree; what is not there is deleted already."""
        try:
            if not self.local:
                self._remote("rm", self._at(name), recursive=True)
            elif os.path.isdir(self._at(name)):
                shutil.rmtree(self._at(name), ignore_errors=True)
            else:
                os.unlink(self._at(name))
        except FileNotFoundError:
            pass

    def make(self) -> None:
        """Create the folder. Raises `UserError` where nothing can be written."""
        try:
            if self.local:
                with told_when_full(self.uri):
                    os.makedirs(self._path, exist_ok=True)
                if not os.access(self._path, os.W_OK | os.X_OK):
                    raise PermissionError(13, "permission denied")
            elif {"s3", "gs"} & set(_protocols(self._fs)):
                bucket = self._path.partition("/")[0]  # never made for a person: the name may only be misspelled
                if not self._remote("exists", bucket):
                    raise PermissionError(13, f"no bucket {bucket!r} is seen with the credentials of this environment")
            else:
                self._remote("makedirs", self._path, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.uri}: {error.strerror or error}. Choose another --out.") from error

    def local_path(self, name: str) -> Path:
        """A path on this machine with the bytes of `name`: the file itself, or a copy fetched once per process.

        Copies stay until the process ends. Whoever goes through many files once borrows them.
        """
        if self.local:
            return Path(self._at(name))
        target = _download_folder() / uuid.uuid5(uuid.NAMESPACE_URL, self._at(name)).hex / _last(name)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            self._fetch(name, partial)
            os.replace(partial, target)
        return target

    @contextmanager
    def borrowed(self, name: str) -> Iterator[Path]:
        """A path on this machine with the bytes of `name` until the block ends; a copy is deleted then."""
        if self.local:
            yield Path(self._at(name))
            return
        with tempfile.TemporaryDirectory(prefix="unclip-") as scratch:
            self._fetch(name, path := Path(scratch) / _last(name))
            yield path

    def _fetch(self, name: str, path: Path) -> None:
        with told_when_full(str(path)):
            self._remote("get_file", self._at(name), str(path))

    @contextmanager
    def _private(self, name: str) -> Iterator[Path]:
        target = Path(self._at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        private = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            yield private
        finally:
            private.unlink(missing_ok=True)


@contextmanager
def told_when_full(place: str) -> Iterator[None]:
    """A full disk, in words that say which and what to do. What was committed before stays committed."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WorkFailed(
            f"no space left for {place} ({error.strerror}). Free some on that disk and run again: what is done stays "
            f"done; or choose another --out."
        ) from error


_downloads: tempfile.TemporaryDirectory[str] | None = None


def _download_folder() -> Path:
    global _downloads
    if _downloads is None:
        _downloads = tempfile.TemporaryDirectory(prefix="unclip-")
    return Path(_downloads.name)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _status_of(error: OSError) -> int | None:
    """The HTTP status behind an error of a store: s3fs makes an anonymous `OSError` of most."""
    cause = error.__cause__
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):
        return int(answer["ResponseMetadata"]["HTTPStatusCode"])
    code = getattr(cause, "code", None)  # gcsfs
    return int(code) if isinstance(code, int | str) and str(code).isdigit() else None


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    _sync_file(path)
