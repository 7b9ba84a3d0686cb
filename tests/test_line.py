"""A line between a coordinator and a worker: whatever the connection does, messages arrive once and in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.line import BadFrame, Line, aside, first_body


def carry(frames: list[bytes], to: Line, got: list[bytes]) -> list[bytes]:
    """Delivers frames; returns the answers."""
    answers = []
    for frame in frames:
        body, replies = to.take(frame)
        got += [body] if body is not None else []
        answers += replies
    return answers


def test_messages_arrive_and_are_forgotten_when_acknowledged() -> None:
    ours, theirs = Line(), Line()
    got: list[bytes] = []
    carry([ours.send(b"a"), ours.send(b"bc")], theirs, got)
    assert (got, ours.kept, ours.kept_bytes, theirs.owes) == ([b"a", b"bc"], 2, 3, 2)
    carry([theirs.idle()], ours, [])
    assert (ours.kept, ours.kept_bytes, theirs.owes) == (0, 0, 0)


def test_what_was_lost_is_said_again_after_a_reconnection() -> None:
    ours, theirs = Line(), Line()
    got: list[bytes] = []
    carry([ours.send(b"1")], theirs, got)
    ours.send(b"2")
    ours.send(b"3")
    carry(ours.resume(), theirs, got)
    assert got == [b"1", b"2", b"3"]


def test_a_gap_is_noticed_without_a_reconnection() -> None:
    ours, theirs = Line(), Line()
    got: list[bytes] = []
    ours.send(b"1")
    answers = carry([ours.idle()], theirs, got)
    carry(carry(answers, ours, []), theirs, got)
    assert got == [b"1"]


def test_a_gap_is_asked_about_once_and_not_for_each_frame_behind_it() -> None:
    ours, theirs = Line(), Line()
    ours.send(b"lost")
    assert len(carry([ours.send(b"x") for _ in range(50)], theirs, [])) == 1


@pytest.mark.parametrize("frame", [b"", b"short", b"\x09" + bytes(16)])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        Line().take(frame)
    with pytest.raises(BadFrame):
        first_body(frame)


def test_an_acknowledgement_of_what_was_never_sent_is_another_conversation() -> None:
    other = Line()
    sender = Line()
    other.take(sender.send(b"x"))
    with pytest.raises(BadFrame):
        Line().take(other.idle())


def test_outside_of_a_conversation() -> None:
    line = Line()
    assert line.take(aside(b"who are you")).body == b"who are you"
    assert first_body(line.send(b"hello")) == b"hello"
    assert first_body(line.send(b"second")) is None
    assert first_body(aside(b"x")) is None


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), loss=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_nothing_is_lost_or_repeated_over_a_connection_that_breaks(seed: int, loss: float) -> None:
    dice = random.Random(seed)
    ends = (Line(), Line())
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    got: tuple[list[bytes], list[bytes]] = ([], [])
    wires: tuple[list[bytes], list[bytes]] = ([], [])  # by sender
    for turn in range(60):
        side = dice.randrange(2)
        if dice.random() < 0.6:
            body = b"%d" % turn
            sent[side].append(body)
            wires[side].append(ends[side].send(body))
        if dice.random() < 0.5:
            count = dice.randrange(len(wires[side]) + 1)
            frames, wires[side][:count] = wires[side][:count], []
            wires[1 - side].extend(carry(frames, ends[1 - side], got[1 - side]))
        if dice.random() < loss / 4:  # the connection breaks: what is under way is lost, in both directions
            wires[0].clear()
            wires[1].clear()
            wires[0].extend(ends[0].resume())
    wires[0].clear()
    wires[1].clear()
    wires[0].extend(ends[0].resume())
    for _ in range(10):
        for side in (0, 1):
            frames, wires[side][:] = list(wires[side]), []
            wires[1 - side].extend(carry(frames, ends[1 - side], got[1 - side]))
            wires[side].append(ends[side].idle())
    assert (got[1], got[0]) == sent
    assert ends[0].kept == ends[1].kept == 0
