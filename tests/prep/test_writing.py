"""How rows reach a store: once if they come fast, group by group if they do not, and the same in the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from prep import writing
from prep.units import Unit
from prep.writing import Part, Writer
from schemas.shards import GROUP_ROWS, ShardHeader, ShardIndex, latent_row
from schemas.stores import LocalStore

HEADER = ShardHeader("LatentRow", "e1", {"latent": (2, 3)})
KEYS = tuple(f"{number:02}" for number in range(2 * GROUP_ROWS + 8))


class Noted(LocalStore):
    """A folder that remembers how many rows each file had that was written."""

    written: list[int]

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with super().write(name) as path:
            yield path
        self.written.append(len(ShardIndex(self.folder, [name])))


def encoded(folder: Path, most_rows: int = 128) -> tuple[list[int], list[Part]]:
    """Write a unit row by row; return the rows of each file that was written, and what was told."""
    store = Noted(folder)
    object.__setattr__(store, "written", [])
    unit, writer = Unit("u", store, "e1", "", KEYS, KEYS, most_rows), Writer()
    parts: list[Part] = []
    for number, key in enumerate(KEYS):
        parts += writer.put(unit, HEADER, [latent_row(key, np.full((2, 3), number, np.uint16))])
    parts += writer.finish(unit, {}, {})
    parts += writer.settle()
    writer.close()
    return store.written, parts


def test_a_unit_that_is_encoded_fast_is_written_once_and_is_what_merged_groups_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, told = encoded(tmp_path / "fast")
    assert fast == [len(KEYS)] and [len(part.keys) for part in told] == [len(KEYS), 0]
    limited, _ = encoded(tmp_path / "limited", 24)
    assert limited == [24, 16, 40]
    monkeypatch.setattr(writing, "_KEPT_S", 0.0)
    slow, told = encoded(tmp_path / "slow")
    assert slow == [16, 16, 8, 40] and sum(len(part.keys) for part in told) == len(KEYS) and told[-1].last
    [(name, whole), *more] = [(path.name, path.read_bytes()) for path in (tmp_path / "fast").iterdir()]
    assert not more
    for other in ("limited", "slow"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == {name: whole}


def test_rows_of_a_slow_encoder_are_written_when_they_are_a_group_and_have_waited(
    tmp_path: Path,
) -> None:
    now = [100.0]
    unit, writer = Unit("u", LocalStore(tmp_path), "e1", "", KEYS, KEYS, 128), Writer(lambda: now[0])
    there: list[int] = []
    for number, key in enumerate(KEYS):
        now[0] += writing._KEPT_S / 20
        writer.put(unit, HEADER, [latent_row(key, np.full((2, 3), number, np.uint16))])
        writer.settle()
        there.append(len(ShardIndex(tmp_path)))
    writer.close()
    assert there[19] == 0 and there[20] == 21 == there[38] and there[-1] == 21 and len(ShardIndex(tmp_path)) == 40
