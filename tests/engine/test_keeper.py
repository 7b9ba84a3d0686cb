"""The keeper: what it takes over it has, what it cannot it says, and nothing stays published behind it."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triptych.cluster import ArtifactFolder, Kept
from triptych.engine.keeper import Folder, Memory, PayloadKeeper
from triptych.errors import PayloadLost
from triptych.messages import Descriptor, ticket_for
from triptych.transfer import Exchange, Payload, TransferSettings

PATIENCE = 30.0
SETTINGS = TransferSettings(pool_bytes=1 << 20, budget_bytes=1 << 22, routes=("tcp",), reserve_seconds=0.2)


@pytest.fixture
def worker() -> Iterator[Exchange]:
    with Exchange(SETTINGS) as exchange:
        yield exchange


@pytest.fixture
def ours() -> Iterator[Exchange]:
    with Exchange(SETTINGS) as exchange:
        yield exchange


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(ArtifactFolder(tmp_path / "artifacts"))


@pytest.fixture
def keeper(ours: Exchange, folder: Folder) -> Iterator[PayloadKeeper]:
    made = PayloadKeeper(ours, folder)
    yield made
    made.close()


def kept(keeper: PayloadKeeper, worker: Exchange, what: str, payload: Payload) -> Kept | Exception:
    """The answer to `keep`."""
    answers: queue.SimpleQueue[Kept | Exception] = queue.SimpleQueue()
    keeper.keep("job", what, worker.publish(payload), worker.secret, answers.put)
    return answers.get(timeout=PATIENCE)


def fetched(by: Exchange, offered: tuple[Descriptor, bytes]) -> torch.Tensor:
    with by.fetch(ticket_for(*offered)) as found:
        return found.payload.values["x"].clone()


def test_a_checkpoint_is_kept_offered_replaced_and_dropped(
    keeper: PayloadKeeper, worker: Exchange, ours: Exchange
) -> None:
    for number in (1, 2):
        answer = kept(keeper, worker, "checkpoint", Payload({"x": torch.full((8,), number)}))
        assert isinstance(answer, Kept) and answer.name == "job/checkpoint" and answer.bytes > 64
        offered = keeper.offer(answer.name)
        assert keeper.offer(answer.name)[0] == offered[0], "published once"
        assert fetched(worker, offered).eq(number).all()
        assert ours.stats().kept == 1, "the one before is no longer published"
    keeper.drop("job")
    assert ours.stats().kept == 0
    with pytest.raises(KeyError):
        keeper.offer("job/checkpoint")
    assert ours.stats().open == 0 and worker.stats().open == 0


@pytest.mark.parametrize(
    "values",
    [
        {"files": [torch.zeros(4, dtype=torch.uint8)]},
        {"files": [torch.zeros(4, dtype=torch.uint8)], "media_types": ["image/none"]},
        {"files": [torch.zeros(4, dtype=torch.uint8)], "media_types": []},
        {"files": ["no tensor"], "media_types": ["image/png"]},
        {"files": 3, "media_types": ["image/png"]},
    ],
)
def test_a_result_that_is_none_is_answered_with_an_error(
    values: dict[str, object], keeper: PayloadKeeper, worker: Exchange, ours: Exchange
) -> None:
    assert isinstance(kept(keeper, worker, "result", Payload(values)), Exception)
    assert ours.stats().open == 0, "what was fetched was given back"


def test_what_cannot_be_fetched_is_answered_with_the_reason(keeper: PayloadKeeper, worker: Exchange) -> None:
    descriptor = worker.publish(Payload({"x": torch.zeros(8)}))
    worker.release(descriptor.payload)
    answers: queue.SimpleQueue[Kept | Exception] = queue.SimpleQueue()
    keeper.keep("job", "checkpoint", descriptor, worker.secret, answers.put)
    assert isinstance(answers.get(timeout=PATIENCE), PayloadLost)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda _: b""]
)
def test_a_file_that_was_damaged_is_gone(
    damage: object, keeper: PayloadKeeper, worker: Exchange, tmp_path: Path
) -> None:
    assert isinstance(kept(keeper, worker, "checkpoint", Payload({"x": torch.ones(16)})), Kept)
    file = tmp_path / "artifacts" / "job" / "checkpoint"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(KeyError):
        keeper.offer("job/checkpoint")


def test_what_finds_no_room_is_not_offered(keeper: PayloadKeeper, worker: Exchange, ours: Exchange) -> None:
    assert isinstance(kept(keeper, worker, "checkpoint", Payload({"x": torch.ones(1 << 19)})), Kept)
    others = [ours.publish(Payload({"x": torch.ones(1 << 18)})) for _ in range(3)]
    with pytest.raises(KeyError):
        keeper.offer("job/checkpoint")
    for other in others:
        ours.release(other.payload)
    assert fetched(worker, keeper.offer("job/checkpoint")).numel() == 1 << 19


def test_whatever_goes_wrong_with_an_offer_is_told_as_gone(ours: Exchange) -> None:
    class Failing(Memory):
        def get(self, job: str, name: str) -> Payload:
            raise MemoryError

    keeper = PayloadKeeper(ours, Failing())
    with pytest.raises(KeyError):  # anything else, and the coordinator would not send the task that wants it
        keeper.offer("job/checkpoint")
    keeper.close()


def test_it_waits_for_what_is_under_way_before_it_closes(ours: Exchange, worker: Exchange) -> None:
    keeper = PayloadKeeper(ours, Memory())
    answers: queue.SimpleQueue[Kept | Exception] = queue.SimpleQueue()
    for number in range(8):
        keeper.keep(
            f"job{number}", "result", worker.publish(Payload({"x": torch.ones(64)})), worker.secret, answers.put
        )
    keeper.close()
    ours.close()
    while not answers.empty():
        assert isinstance(answers.get(), Kept), "none was cut off in the middle"


def test_pixels_that_are_not_to_last_stay_off_the_disk(ours: Exchange, worker: Exchange, tmp_path: Path) -> None:
    folder = Folder(ArtifactFolder(tmp_path / "artifacts"), lasting=False)
    keeper = PayloadKeeper(ours, folder)
    answer = kept(keeper, worker, "result", Payload({"images": torch.ones(64)}))
    assert isinstance(answer, Kept) and answer.bytes == 256
    assert isinstance(kept(keeper, worker, "checkpoint", Payload({"x": torch.ones(8)})), Kept)
    assert list(folder.artifacts.names("job")) == ["checkpoint"], "a checkpoint may be large, and is seldom read"
    assert keeper.take("job", "result").values["images"].eq(1).all()
    with pytest.raises(KeyError):
        keeper.take("job", "result")
    keeper.drop("job")
    assert not folder.artifacts.jobs()
    keeper.close()
