"""What is left of a save that failed: one error, raised once."""

import asyncio
import sys

import pytest
import tensorstore as ts

from saejax.train.checkpoint import _without_late_answers


@pytest.mark.parametrize("answer, shown", [("of an array", 0), ("that fails by itself", 1)])
def test_an_array_done_after_its_event_loop_has_ended_says_nothing(monkeypatch, answer, shown):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", _without_late_answers(lambda unraisable: seen.append(unraisable.exc_value)))
    promise, future = ts.Promise.new()
    if shown:
        future.add_done_callback(lambda _: 1 / 0)
    else:
        async def wait():
            asyncio.ensure_future(asyncio.wait_for(future, None))._log_destroy_pending = False
            await asyncio.sleep(0.01)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(wait())
        loop.close()
    promise.set_result(answer)
    assert len(seen) == shown
