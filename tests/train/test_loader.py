"""Reading ahead: the same batches as reading one by one, whatever the order of threads; faults reach the step."""

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from families import open_project
from families.checkpoints import encoder_keys
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.errors import UserError
from schemas.keys import text_key
from schemas.project import Project
from schemas.shards import ShardIndex
from train.data import Shelf
from train.loader import AHEAD, Loader
from train.order import Cursor, Turn, epoch_batches, turns
from train.prompts import Prompt, Prompts

MakeProject = Callable[..., Path]
CPU = torch.device("cpu")


def _cached(folder: Path, *overrides: str) -> tuple[Project, Shelf]:
    project = open_project(folder, overrides=list(overrides))
    scan(project), pairs(project), cache(project)
    return project, Shelf(project, encoder_keys(project))


def _taken(stream: Iterator[Turn], count: int) -> list[Turn]:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("options", [{"posterior": "moments"}, {"text_cache_dtype": "float8"}])
def test_batches_read_ahead_equal_those_read_one_by_one(make_project: MakeProject, options: dict[str, str]) -> None:
    project, shelf = _cached(make_project("deblur", train_batch_size=2, **options))
    with Loader(shelf, turns(project, shelf, Cursor()), CPU) as loader:
        for turn, batches in itertools.islice(loader, 3 * AHEAD):
            for showings, batch in zip(turn.batches, batches, strict=True):
                expected = shelf.load(showings, CPU)
                assert batch.sample_ids == expected.sample_ids == tuple(one.sample_id for one in showings)
                assert torch.equal(batch.latents, expected.latents)
                assert torch.equal(batch.noise, expected.noise)
                assert all(map(torch.equal, batch.references, expected.references))
                assert torch.equal(batch.text.embed, expected.text.embed)
                assert batch.text.num_tokens == expected.text.num_tokens


def test_the_stream_goes_on_identically_from_any_place(make_project: MakeProject) -> None:
    project, shelf = _cached(make_project("edits", train_batch_size=4, gradient_accumulation_steps=3))
    whole = _taken(turns(project, shelf, Cursor()), 9)
    for number, turn in enumerate(whole[:-1]):
        assert _taken(turns(project, shelf, turn.after), 9 - number - 1) == whole[number + 1 :]


def test_processes_share_a_stream_out_without_loss_or_overlap(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=4)
    _, shelf = _cached(folder)
    one, three = (open_project(folder, overrides=[f"gradient_accumulation_steps={n}"]) for n in (3, 1))
    whole = _taken(turns(one, shelf, Cursor()), 5)
    parts = [_taken(turns(three, shelf, Cursor(), rank, 3), 5) for rank in range(3)]
    for step, turn in enumerate(whole):
        assert turn.batches == tuple(batch for rank in range(3) for batch in parts[rank][step].batches)
        assert {parts[rank][step].after for rank in range(3)} == {turn.after}
        assert turn.samples == sum(map(len, turn.batches)) == parts[1][step].samples


def test_no_batch_mixes_shapes_of_targets_references_or_texts(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=3, conditioning_dropout_probability=0.4)
    project, shelf = _cached(folder)
    seen = set()
    for epoch in range(6):
        for batch in epoch_batches(project, shelf, epoch):
            [shapes] = {shelf.shapes(one) for one in batch}
            seen.add(shapes)
            loaded = shelf.load(batch, CPU)
            assert len(loaded.references) == len(batch[0].references)
    assert {len(shapes) for shapes in seen} == {2, 3}  # with and without reference


def test_noise_depends_on_the_showing_alone_not_on_its_batch(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=4)
    project, shelf = _cached(folder)
    for batch in epoch_batches(project, shelf, 0):
        together = shelf.load(batch, CPU)
        for number, one in enumerate(batch):
            assert torch.equal(shelf.load([one], CPU).noise[0], together.noise[number])
    single = open_project(folder, overrides=["train_batch_size=1"])
    seeds = [sorted(one.seed for batch in epoch_batches(p, shelf, 1) for one in batch) for p in (project, single)]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 6


def test_a_damaged_row_reaches_the_step_and_names_sample_file_and_command(make_project: MakeProject) -> None:
    folder = make_project("edits")
    project, _ = _cached(folder)
    for shard in (folder / "work" / "cache" / "latents").glob("*/1*/*.parquet"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1  # inside a latent
        shard.write_bytes(data)
    shelf = Shelf(project, encoder_keys(project))
    told = pytest.raises(UserError, match=r"samples \w+.*parquet.*damaged.*prep cache --verify --repair")
    with told, Loader(shelf, turns(project, shelf, Cursor()), CPU) as loader:
        for _, batches in itertools.islice(loader, 12):
            list(batches)


def test_a_truncated_shard_is_refused_before_the_first_step(make_project: MakeProject) -> None:
    folder = make_project("edits")
    project, _ = _cached(folder)
    shard = next((folder / "work" / "cache" / "latents").glob("*/1*/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name}.*prep cache"):
        Shelf(project, encoder_keys(project))


def test_sets_are_weighed_by_repeats_and_probability(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets.append(datasets[0] | {"id": "plain", "conditioning_data": [], "repeats": 3, "probability": 0.5})
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    project, shelf = _cached(folder)
    for epoch in range(4):
        shown = [one for batch in epoch_batches(project, shelf, epoch) for one in batch]
        plain = [one for one in shown if not one.references]
        assert len(shown) - len(plain) == 6 and len(plain) == 3 * 4
        assert len({one.seed for one in shown}) == len(shown)


def test_a_fault_of_planning_reaches_the_step_and_no_thread_stays(make_project: MakeProject) -> None:
    project, shelf = _cached(make_project("edits"))

    def broken() -> Iterator[Turn]:
        yield from _taken(turns(project, shelf, Cursor()), 2)
        raise RecursionError("planning failed")

    before = threading.active_count()
    with pytest.raises(RecursionError, match="planning failed"), Loader(shelf, broken(), CPU) as loader:
        for _, batches in loader:
            list(batches)
    with Loader(shelf, turns(project, shelf, Cursor()), CPU):
        pass
    assert threading.active_count() == before


def test_a_prompt_that_repeats_is_read_once(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    project, shelf = _cached(make_project("deblur", train_batch_size=2))
    encoder = encoder_keys(project).text
    known = {text_key(encoder, prompt) for one in shelf.samples for prompt in (*one.prompts, "")}
    read: list[str] = []
    fill = ShardIndex.fill
    monkeypatch.setattr(ShardIndex, "fill", lambda self, keys, arrays: read.extend(keys) or fill(self, keys, arrays))
    with Loader(shelf, turns(project, shelf, Cursor()), CPU) as loader:
        steps = [(turn.batches[0], next(batches)) for turn, batches in itertools.islice(loader, 4 * len(known))]
    asked = Counter(one.prompt for showings, _ in steps for one in showings)
    assert max(asked.values()) > 2
    assert [read.count(text_key(encoder, prompt)) for prompt in asked] == [1] * len(asked)
    for showings, batch in steps:
        assert torch.equal(batch.text.embed, shelf.text([one.prompt for one in showings], CPU).embed)
    assert len({batch.text.embed.data_ptr() for _, batch in steps}) == len(steps)  # none can change another


def _prompt(size: int) -> Prompt:
    return Prompt(torch.zeros(size, 1, dtype=torch.bfloat16), None, None, 1)


def test_prompts_stay_as_long_as_there_is_room_the_last_used_longest() -> None:
    kept, read = Prompts(most=2 * 300), list[str]()

    def some(keys: Sequence[str]) -> list[Prompt]:
        read.extend(keys)
        return [_prompt(100) for _ in keys]

    for keys in (["a", "b", "a"], ["c"], ["a"], ["d"], ["c", "a"], ["b"]):
        assert len(kept.of(keys, some)) == len(keys)
    assert read == ["a", "b", "c", "d", "b"]
    one, other = kept.of(["a"], some)[0], kept.of(["a"], some)[0]
    assert one is other and one.move(CPU).embed is one.move(CPU).embed
    assert kept.of(["large"], lambda _: [_prompt(1000)])[0].num_bytes == 2000
    assert kept.of(["a"], some) and read[-1] == "a"


def test_a_prompt_that_cannot_be_read_is_tried_again_and_fails_all_who_wait_for_it() -> None:
    kept, asked, waiting = Prompts(), threading.Event(), threading.Event()
    faults: list[Exception] = []

    def broken(_keys: Sequence[str]) -> list[Prompt]:
        asked.set()
        waiting.wait(10)
        raise UserError("damaged")

    def ask() -> None:
        try:
            kept.of(["a"], broken)
        except UserError as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert asked.wait(10)
    threads[1].start()
    waiting.set()
    for one in threads:
        one.join(10)
    assert [str(one) for one in faults] == ["damaged", "damaged"]
    assert kept.of(["a"], lambda _: [_prompt(1)])[0].num_tokens == 1
