"""From the marks of one ``generate()`` to the record's times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.timeline import Mark, partition
from vlm_latency.models.boundaries import DECODE_FORWARD, ENCODER, PREFILL, PROJECTOR
from vlm_latency.records import TIME_COLUMNS, Row

DECODE, OTHER = "T_LLM_decode", "T_other"

# What a method of measuring tells; preprocessing is timed outside of it.
TIMES = tuple(name for name in TIME_COLUMNS if name != "T_preprocess")


def intervals(marks: Sequence[Mark], num_output_tokens: int) -> Row:
    """Turn the marks of one ``generate()`` into the record's intervals.

    Parameters
    ----------
    marks
        ``T_other`` around everything and, in it, the labels of `models.boundaries.boundaries`.
    num_output_tokens
        How many tokens came out; as many forwards must be there.

    Returns
    -------
    dict
        Milliseconds by time column; ``T_total = T_vision_total + T_LLM_prefill + T_LLM_decode +
        T_other``, ``T_vision_total = T_vision_encoder + T_projector`` and ``T_LLM_decode =
        T_LLM_decode_forward + T_LLM_decode_between``, to floating-point rounding.

    Raises
    ------
    MeasurementError
        When the number of forwards is not the number of tokens.
    """
    forwards = (PREFILL, DECODE_FORWARD)
    ends = [mark.time_ns for mark in marks if mark.label in forwards and not mark.opens]
    if len(ends) != num_output_tokens:
        raise MeasurementError(
            f"{num_output_tokens} tokens came from {len(ends)} forwards; one each was expected "
            "(does the model generate in another way, or cut its prefill into chunks?)"
        )
    owned = dict.fromkeys((ENCODER, PROJECTOR, PREFILL, DECODE_FORWARD, DECODE, OTHER), 0)
    owned |= partition(with_decode(marks))
    between = owned[DECODE]
    owned[DECODE] += owned[DECODE_FORWARD]
    times: Row = {label: ns / 1e6 for label, ns in owned.items()}
    times["T_LLM_decode_between"] = between / 1e6
    times["T_vision_total"] = (owned[ENCODER] + owned[PROJECTOR]) / 1e6
    times["T_total"] = (marks[-1].time_ns - marks[0].time_ns) / 1e6
    times["T_first_token"] = (ends[0] - marks[0].time_ns) / 1e6
    steps = [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(ends)]
    times["decode_step_ms"] = steps
    times["T_first_decode_step"] = steps[0] if steps else None
    times["T_per_output_token"] = times[DECODE] / len(steps) if steps else None
    return times


def with_decode(marks: Sequence[Mark]) -> list[Mark]:
    """Put ``T_LLM_decode`` from the end of the prefill to the end of the last forward."""
    ends = [i for i, mark in enumerate(marks) if mark.label == DECODE_FORWARD and not mark.opens]
    if not ends:
        return list(marks)
    first = marks.index(next(m for m in marks if m.label == PREFILL and not m.opens)) + 1
    last = ends[-1] + 1
    return [
        *marks[:first],
        Mark(marks[first - 1].time_ns, DECODE, True),
        *marks[first:last],
        Mark(marks[last - 1].time_ns, DECODE, False),
        *marks[last:],
    ]
