"""Where the bytes of images are: a folder, a bucket behind a URL, downloads of a list, rows of a dataset.

A new kind is a frozen class here, a branch of `place_of` and one of `read_bytes`. Places are small and can be sent to
other processes; what is opened for them is kept per process.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import canonical
from schemas.project import Project, resolved

ResultT = TypeVar("ResultT")

_ATTEMPTS = 3
_PAUSE_S = 0.5  # before the second attempt; doubled each time


@dataclass(frozen=True, slots=True)
class Folder:
    """Files of a local folder."""

    root: str

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return str(Path(self.root) / path)


@dataclass(frozen=True, slots=True)
class Downloads:
    """Images of a list: fetched into a folder, or lying beside the list."""

    root: str
    beside: str

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return str(self.file(path))

    def file(self, path: str) -> Path:
        """Return the file of one image."""
        fetched = Path(self.root) / path
        return fetched if fetched.exists() else Path(self.beside) / path


@dataclass(frozen=True, slots=True)
class Bucket:
    """Files below a URL that fsspec reads."""

    url: str
    options: str = field(default="{}", repr=False)  # JSON; may hold a secret

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return f"{self.url}/{path}"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a dataset that the `datasets` library reads; row 7 is `7.jpg`."""

    dataset: str  # hub name, or path of a folder
    split: str
    image_column: str
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    cache_dir: str | None = None
    num_proc: int | None = None

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return f"{self.dataset}[{self.split}]/{path}"


Place: TypeAlias = Folder | Downloads | Bucket | Rows


def place_of(project: Project, dataset: DatasetConfig) -> Place:
    """Return where a dataset's images are."""
    if dataset.type == "csv":
        assert dataset.csv_file is not None, "checked when the project was loaded"
        return Downloads(str(project.downloads(dataset)), str(resolved(project.root, dataset.csv_file).parent))
    if dataset.type == "huggingface":
        return _rows(project, dataset)
    url = project.url_of(dataset)
    return Bucket(url, _bucket_options(url, dataset)) if url is not None else Folder(str(project.folder_of(dataset)))


def _rows(project: Project, dataset: DatasetConfig) -> Rows:
    table = dataset.huggingface
    assert dataset.dataset_name is not None, "checked when the project was loaded"
    here = resolved(project.root, dataset.dataset_name)
    return Rows(
        dataset=str(here) if here.exists() else dataset.dataset_name,
        split=table.split,
        image_column=table.image_column,
        revision=table.revision,
        data_files=table.data_files,
        cache_dir=str(resolved(project.root, table.cache_dir)) if table.cache_dir is not None else None,
        num_proc=table.num_proc,
    )


def _bucket_options(url: str, dataset: DatasetConfig) -> str:
    """Spell what fsspec needs to know besides the URL; only S3 needs anything."""
    if not url.startswith(("s3:", "s3a:")):
        return "{}"
    client = {"region_name": dataset.aws_region_name, "endpoint_url": dataset.aws_endpoint_url}
    options: dict[str, object] = {
        "key": dataset.aws_access_key_id,
        "secret": dataset.aws_secret_access_key,
        "token": dataset.aws_session_token,
        "client_kwargs": {name: value for name, value in client.items() if value},
        "config_kwargs": {"max_pool_connections": dataset.aws_max_pool_connections},
    }
    return canonical({name: value for name, value in options.items() if value})


def read_bytes(place: Place, path: str) -> bytes:
    """Read one image's file; raises OSError."""
    if isinstance(place, Folder):
        return (Path(place.root) / path).read_bytes()
    if isinstance(place, Downloads):
        return place.file(path).read_bytes()
    if isinstance(place, Rows):
        return row_bytes(open_rows(place)[row_number(path)][place.image_column])
    system, root = open_bucket(place)
    return bytes(stubborn(lambda: system.cat_file(f"{root}/{path}")))


def read_many(place: Bucket, paths: Sequence[str]) -> list[bytes | OSError]:
    """Read several files of a bucket at once; a fault stands in for a file that cannot be read."""
    system, root = open_bucket(place)
    full = [f"{root}/{path}" for path in paths]
    got = stubborn(lambda: system.cat(full, on_error="return"))
    return [_or_again(system, one, got.get(one)) for one in full]


def _or_again(system: Any, file: str, got: Any) -> bytes | OSError:
    """Take a file's bytes; one that failed is asked for again by itself."""
    if isinstance(got, bytes):
        return got
    try:
        return bytes(stubborn(lambda: system.cat_file(file)))
    except OSError as fault:
        return fault


def stubborn(ask: Callable[[], ResultT]) -> ResultT:
    """Ask a service up to three times; raises OSError, whatever its client raises."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            raise
        except Exception as fault:
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"{type(fault).__name__}: {fault}") from fault
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


@lru_cache(maxsize=16)
def open_bucket(place: Bucket) -> tuple[Any, str]:
    """Return (fsspec file system, path in it); raises UserError if nothing reads such URLs."""
    import fsspec  # noqa: PLC0415 - most projects need none

    try:
        system, root = fsspec.core.url_to_fs(place.url, **json.loads(place.options))
    except (ImportError, ValueError) as fault:
        raise UserError(f"{place.url}: cannot be opened: {fault}") from fault
    return system, root.rstrip("/")


def row_number(path: str) -> int:
    """Return the number of the row that a path names."""
    return int(path.partition(".")[0])


def row_bytes(value: Any) -> bytes:
    """Return the bytes of an image column's value: a struct of bytes or a path, bytes, or a path. Raises OSError."""
    path = value
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if isinstance(path, str):
        return Path(path).read_bytes()
    raise OSError("the row has no image")


@lru_cache(maxsize=16)
def open_rows(place: Rows, *, streaming: bool = False) -> Any:
    """Open a dataset of the `datasets` library, images undecoded; raises UserError."""
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    datasets.disable_progress_bars()
    try:
        opened = _load(datasets, place, streaming)
        if place.image_column not in opened.column_names:
            known = ", ".join(opened.column_names)
            raise UserError(f"{place.dataset}: no column '{place.image_column}' (image_column); it has {known}")
        if isinstance(opened.features[place.image_column], datasets.Image):
            return opened.cast_column(place.image_column, datasets.Image(decode=False))
        return opened
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        told = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise UserError(f"{place.dataset}: cannot be opened by the datasets library: {told}") from fault


def _load(datasets: Any, place: Rows, streaming: bool) -> Any:
    if (Path(place.dataset) / "state.json").exists():
        return datasets.load_from_disk(place.dataset)
    if (Path(place.dataset) / "dataset_dict.json").exists():
        return datasets.load_from_disk(place.dataset)[place.split]
    return datasets.load_dataset(
        place.dataset,
        split=place.split,
        revision=place.revision,
        data_files=list(place.data_files) or None,
        cache_dir=place.cache_dir,
        streaming=streaming,
        **({} if streaming else {"num_proc": place.num_proc}),
    )
