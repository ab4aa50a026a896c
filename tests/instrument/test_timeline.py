from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.clock import CudaClock, HostClock
from vlm_latency.instrument.intervals import intervals
from vlm_latency.instrument.timeline import Mark, Timeline, partition


def fake(*times: int) -> HostClock:
    return HostClock(now=iter(times).__next__)


def test_nested_and_repeated_labels_get_their_own_time() -> None:
    clock = fake(0, 10, 13, 20, 22, 30, 31, 33, 40, 100)
    timeline = Timeline(clock)
    timeline.restart(16)
    timeline.open("all")  # 0
    timeline.open("a")  # 10
    timeline.open("b")  # 13
    timeline.close("b")  # 20
    timeline.open("b")  # 22
    timeline.open("b")  # 30: inside itself
    timeline.close("b")  # 31
    timeline.close("b")  # 33
    timeline.close("a")  # 40
    timeline.finish("all")  # 100
    assert partition(timeline.host_marks()) == {"all": 70, "a": 12, "b": 18}


def test_a_label_closed_under_another_leaves_that_one_open() -> None:
    marks = [
        Mark(0, "a", True),
        Mark(2, "b", True),
        Mark(5, "a", False),
        Mark(9, "b", False),
    ]
    assert partition(marks) == {"a": 2, "b": 7}


def test_time_that_no_label_owns_is_outside() -> None:
    marks = [Mark(0, "a", True), Mark(1, "a", False), Mark(5, "b", True), Mark(6, "b", False)]
    assert partition(marks, outside="gap") == {"a": 1, "gap": 4, "b": 1}


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ([Mark(0, "a", False)], "not open"),
        ([Mark(0, "a", True)], "still open"),
        ([Mark(5, "a", True), Mark(3, "a", False)], "backwards"),
    ],
)
def test_impossible_marks_are_refused(marks: list[Mark], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(marks)


@st.composite
def mark_sequences(draw: st.DrawFn) -> list[Mark]:
    """Any order of opening and closing, nested or crossing, that leaves nothing open."""
    marks: list[Mark] = []
    stack: list[str] = []
    now = draw(st.integers(0, 10**12))
    for _ in range(draw(st.integers(1, 30))):
        now += draw(st.integers(0, 10**9))
        if stack and draw(st.booleans()):
            label = draw(st.sampled_from(stack))
            stack.remove(label)
            marks.append(Mark(now, label, False))
        else:
            label = draw(st.sampled_from("abcde"))
            stack.append(label)
            marks.append(Mark(now, label, True))
    for label in draw(st.permutations(stack)):
        now += draw(st.integers(0, 10**9))
        marks.append(Mark(now, label, False))
    return marks


@given(mark_sequences())
def test_parts_always_sum_to_the_total(marks: list[Mark]) -> None:
    owned = partition(marks)
    assert sum(owned.values()) == marks[-1].time_ns - marks[0].time_ns
    assert min(owned.values()) >= 0


@given(mark_sequences())
def test_every_interval_has_the_owner_opened_last(marks: list[Mark]) -> None:
    """The partition against a second, slower definition: replay each interval from the start."""
    expected: dict[str, int] = {}
    for index, (mark, following) in enumerate(itertools.pairwise(marks), start=1):
        open_labels: list[str] = []
        for earlier in marks[:index]:
            if earlier.opens:
                open_labels = [*open_labels, earlier.label]
            else:
                at = max(i for i, label in enumerate(open_labels) if label == earlier.label)
                open_labels = open_labels[:at] + open_labels[at + 1 :]
        owner = open_labels[-1] if open_labels else ""
        expected[owner] = expected.get(owner, 0) + following.time_ns - mark.time_ns
    owned = partition(marks)
    assert {k: v for k, v in owned.items() if v} == {k: v for k, v in expected.items() if v}


def test_more_marks_than_foreseen_are_kept() -> None:
    timeline = Timeline(fake(*range(100)))
    timeline.restart(1)
    for _ in range(10):
        timeline.open("a")
        timeline.close("a")
    assert [mark.time_ns for mark in timeline.host_marks()] == list(range(20))


def test_a_device_clock_is_stamped_at_every_boundary_and_waited_for_once() -> None:
    events: list[str] = []

    class Device(HostClock):
        def stamp(self, slot: int) -> None:
            super().stamp(slot)
            events.append(f"stamp {slot}")

        def synchronize(self) -> None:
            events.append("wait")

    timeline = Timeline(fake(0, 1, 2, 50), Device(iter([100, 104, 120, 130]).__next__))
    timeline.restart(4)
    timeline.open("all")
    timeline.open("a")
    timeline.close("a")
    timeline.finish("all")
    assert events == ["stamp 0", "stamp 1", "stamp 2", "stamp 3", "wait"]
    assert partition(timeline.host_marks()) == {"all": 49, "a": 1}
    assert partition(timeline.device_marks() or []) == {"all": 14, "a": 16}


def test_a_restarted_timeline_has_forgotten_everything() -> None:
    timeline = Timeline(fake(*range(10)))
    timeline.restart(2)
    timeline.open("a")
    timeline.restart(2)
    timeline.open("b")
    timeline.finish("b")
    assert timeline.host_marks() == [Mark(1, "b", True), Mark(2, "b", False)]
    assert timeline.device_marks() is None


MS = 1_000_000


def request_marks(vision_inside: bool) -> list[Mark]:
    """20 ms set-up, vision 30 (encoder 22), then a prefill of 40 and two steps of 8 and 9."""
    vision = [
        ("T_projector", True, 0),
        ("T_vision_encoder", True, 5),
        ("T_vision_encoder", False, 22),
        ("T_projector", False, 3),
    ]
    prefill = [("T_LLM_prefill", True, 0 if vision_inside else 2), ("T_LLM_prefill", False, 40)]
    step = "T_LLM_decode_forward"
    steps = [(step, True, 1), (step, False, 7), (step, True, 2)]
    order = [("T_other", True, 0), ("T_other", True, 20), ("T_other", False, 0)]
    order += [prefill[0], *vision, prefill[1]] if vision_inside else [*vision, *prefill]
    order += [*steps, (step, False, 7), ("T_other", False, 4)]
    marks, now = [], 7 * MS
    for label, opens, after in order:
        now += after * MS
        marks.append(Mark(now, label, opens))
    return marks


@pytest.mark.parametrize("vision_inside", [False, True])
def test_intervals_of_a_request_worked_by_hand(vision_inside: bool) -> None:
    times = intervals(request_marks(vision_inside), num_output_tokens=3)
    between = 0 if vision_inside else 2  # from the end of vision to the start of the prefill
    assert times["T_vision_encoder"] == 22
    assert times["T_projector"] == 8
    assert times["T_vision_total"] == 30
    assert times["T_LLM_prefill"] == 40
    assert times["decode_step_ms"] == [8, 9]
    assert times["T_LLM_decode"] == 17
    assert times["T_LLM_decode_forward"] == 7 + 7
    assert times["T_LLM_decode_between"] == 1 + 2
    assert times["T_first_decode_step"] == 8
    assert times["T_per_output_token"] == 8.5
    assert times["T_first_token"] == 20 + 30 + between + 40
    assert times["T_other"] == 20 + between + 4
    assert times["T_total"] == 20 + 30 + between + 40 + 17 + 4


def test_prefill_only_has_no_decode() -> None:
    marks = [
        Mark(0, "T_other", True),
        Mark(2 * MS, "T_LLM_prefill", True),
        Mark(5 * MS, "T_LLM_prefill", False),
        Mark(6 * MS, "T_other", False),
    ]
    times = intervals(marks, num_output_tokens=1)
    assert times["T_LLM_decode"] == 0
    assert times["T_LLM_decode_forward"] == times["T_LLM_decode_between"] == 0
    assert times["T_first_decode_step"] is None
    assert times["decode_step_ms"] == []
    assert times["T_per_output_token"] is None
    assert times["T_vision_total"] == 0
    assert times["T_other"] == 3


def test_forwards_must_match_the_tokens() -> None:
    with pytest.raises(MeasurementError, match="4 tokens came from 3 forwards"):
        intervals(request_marks(False), num_output_tokens=4)


def test_device_times_keep_their_resolution_after_minutes() -> None:
    """CUDA tells the time between two events in float32 milliseconds."""

    class Event(int):
        def elapsed_time(self, other: int) -> float:
            return float(np.float32((other - self) / 1e6))

    steps = [0, 150_000 * MS, 300_001, 299_999, 300_123]
    clock = CudaClock("cuda")
    clock._events = [Event(at) for at in np.cumsum(steps)]
    times = clock.read(5)
    assert np.diff(times)[1:].tolist() == steps[2:]
    coarse = [clock._events[0].elapsed_time(event) * 1e6 for event in clock._events]
    assert np.abs(np.diff(coarse)[1:] - steps[2:]).max() > 3_000  # what summing up avoids
    assert clock.read(0) == []
