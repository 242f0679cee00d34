"""How batches reach an encoder and come back: filled up where it is compiled, the next one launched before."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from families import flux, open_project
from families.fast_vae import FastEncoder
from prep import encode, launching
from prep.cache import cache
from prep.launching import Flight, Launcher
from schemas.summaries import AcceleratorUse
from tests.prep.test_cache import MakeProject, Small, prepared, rows

CPU = torch.device("cpu")


def drawn(count: int, height: int = 64, width: int = 48) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


class Seen:
    """Stands before a family and remembers the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode_images(self, encoder: object, pixels: torch.Tensor) -> object:
        self.shapes.append(tuple(pixels.shape))
        return flux.encode_images(encoder, pixels)


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    vae = flux._tiny_vae().to(torch.bfloat16).requires_grad_(False)
    return Launcher(Seen(), vae, CPU, FastEncoder(vae.encoder, tmp_path, "eager"))


def test_a_short_batch_is_filled_up_where_the_encoder_is_compiled(launcher: Launcher) -> None:
    pictures, enough = drawn(3), launching._WORTH // (64 * 48) + 1
    flight = launcher.launch(pictures, 4, enough)
    mean = launcher.land(flight).mean
    assert launcher._family.shapes == [(4, 64, 48, 3)]
    assert mean.shape[0] == flight.posterior.std.shape[0] == 3
    alone = torch.cat([flux.encode_images(launcher._encoder, torch.from_numpy(one)[None]).mean for one in pictures])
    assert (mean.float() - alone.float()).norm() < 0.03 * alone.float().norm()
    assert launcher.launch(drawn(4), 2, enough).posterior.mean.shape[0] == 4  # batches shrank meanwhile


def test_few_pictures_of_a_size_are_not_worth_compiling(launcher: Launcher) -> None:
    posterior = launcher.land(launcher.launch(drawn(3), 4, launching._WORTH // (64 * 48)))
    assert launcher._family.shapes == [(3, 64, 48, 3)] and launcher._fast.seconds == 0
    expected = flux.encode_images(launcher._encoder, torch.from_numpy(np.stack(drawn(3))))
    assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.std, expected.std)


def test_a_short_batch_stays_short_where_compiling_fails(launcher: Launcher) -> None:
    launcher._fast._works = False
    launcher.launch(drawn(3), 4, launching._WORTH)
    assert launcher._family.shapes == [(3, 64, 48, 3)]


def recorded(monkeypatch: pytest.MonkeyPatch, behind: int) -> list[tuple[str, int]]:
    """Leave so many batches under way, and note what happens to which."""
    events: list[tuple[str, int]] = []
    numbers: dict[int, int] = {}
    launch, land = Launcher.launch, Launcher.land
    monkeypatch.setattr(Launcher, "behind", behind)

    def launched(self: Launcher, *arguments: object) -> Flight:
        flight = launch(self, *arguments)
        numbers[id(flight)] = len(numbers)
        events.append(("launch", numbers[id(flight)]))
        flights.append(flight)  # or another could have its id
        return flight

    def landed(self: Launcher, flight: Flight) -> object:
        events.append(("land", numbers[id(flight)]))
        return land(self, flight)

    flights: list[Flight] = []
    monkeypatch.setattr(Launcher, "launch", launched)
    monkeypatch.setattr(Launcher, "land", landed)
    return events


@pytest.mark.parametrize(("room", "behind"), [(9, 1), (1, 1), (9, 3)])
def test_the_next_batch_is_launched_before_one_is_read_back_and_rows_stay_the_same(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch, room: int, behind: int
) -> None:
    folder = prepared(make_project("edits", vae_dtype="fp32"))
    monkeypatch.setattr("prep.units._MOST_ROWS", 3)
    cache(folder, workers=1)
    expected = rows(folder)
    shutil.rmtree(folder / "work" / "cache" / "latents")
    sizes: list[int] = []
    with monkeypatch.context() as patch:
        family = encode.family_of(open_project(folder))
        small = OneByOne(family, room, sizes)
        patch.setattr(encode, "_batch_size", lambda wanted: 2)
        patch.setattr(encode, "family_of", lambda project: small)
        events = recorded(patch, behind)
        assert [store.encoded for store in cache(folder, workers=1).stores] == [12, 0]
    assert rows(folder) == expected
    assert max(sizes) == 2 and sorted(sizes)[0] == 1 if room == 1 else set(sizes) <= {1, 2}
    count = sum(what == "launch" for what, _ in events)
    assert [number for what, number in events if what == "land"] == list(range(count))
    when = {event: place for place, event in enumerate(events)}
    assert count > 2 * behind  # of several units: what comes next is launched before the last batch of one is back
    assert all(when["launch", number + 1] < when["land", number] for number in range(count - 1))
    assert all(when["land", number] < when["launch", number + behind + 2] for number in range(count - behind - 2))


class OneByOne(Small):
    """Has room for so many images, and encodes them one after the other: neighbours would show in last bits."""

    def __init__(self, family: object, room: int, sizes: list[int]) -> None:
        super().__init__(family, room)
        self.batches = sizes

    def encode_images(self, encoder: object, pixels: torch.Tensor) -> object:
        self.batches.append(len(pixels))
        if len(pixels) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made = [self._family.encode_images(encoder, one[None]) for one in pixels]
        return type(made[0])(torch.cat([one.mean for one in made]), torch.cat([one.std for one in made]))


def test_a_unit_tells_how_many_pictures_of_its_size_there_are(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(make_project("deblur"))
    monkeypatch.setattr("prep.units._MOST_ROWS", 2)
    seen: dict[str, list[int]] = {}
    work = encode.Latents.work

    def noted(self: encode.Latents, unit: object, pixels: object) -> object:
        seen.setdefault(unit.folder, []).append(unit.alike)
        count.setdefault(unit.folder, []).append(len(unit.keys))
        return work(self, unit, pixels)

    count: dict[str, list[int]] = {}
    monkeypatch.setattr(encode.Latents, "work", noted)
    assert cache(folder, workers=1).accelerator is None
    assert sum(map(sum, count.values())) == 12 and max(map(len, seen.values())) > 1
    assert all(set(alike) == {sum(count[size])} for size, alike in seen.items())


def test_the_gpus_share_is_told() -> None:
    said: Callable[..., list[str]] = lambda *waits: list(AcceleratorUse(0.934, 600, 8.0, *waits).lines())  # noqa: E731
    rate = "  75.0 images/s in 8 s of encoding; GPU busy 93%"
    assert said(0.0, 0.3, 0.2) == [rate]
    assert said(14.2, 0.0, 0.0) == [f"{rate}; compiling the encoder took 14 s before"]
    assert said(0.0, 0.0, 2.6) == [f"{rate}; waited 3 s for the disk"]
    assert said(0.0, 1.2, 2.6) == [f"{rate}; waited 1 s for pictures (more workers decode faster) and 3 s for the disk"]


def test_what_is_waited_for_is_counted_from_the_first_batch_on(launcher: Launcher) -> None:
    def wait(what: str) -> None:
        with launcher.waiting(what):
            time.sleep(0.05)

    wait("pixels")
    flight = launcher.launch(drawn(1), 1, 1)
    wait("disk")
    launcher.land(flight)
    launcher._images, launcher._seconds = 1, 1.0  # as on a GPU
    used = launcher.used()
    assert used is not None and used.pixels_s == 0 and 0.05 <= used.disk_s < 5
