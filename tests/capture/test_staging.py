"""Rows on their way to the writer: in order, from memory that is used again, never more than two batches at once."""

import threading
import time

import pytest
import torch

from capture.staging import SLABS, Staging


def test_batches_are_handed_on_in_order_and_two_at_most() -> None:
    seen: list[int] = []
    taken: list[int] = []
    with Staging() as staging:
        for i in range(8):
            slab = staging.slab(40)
            part = slab.take((10,), torch.float32)
            part.fill_(i)
            taken.append(part.data_ptr())

            def work(i: int = i, part: torch.Tensor = part) -> None:
                time.sleep(0.005)
                assert part.tolist() == [i] * 10, "nobody else writes to it before it is handed on"
                seen.append(i)

            staging.hand_on(slab, work)
            assert i - len(seen) < SLABS
        staging.flush()
        assert seen == list(range(8))
    assert len(set(taken)) == SLABS


def test_parts_of_a_slab_do_not_overlap() -> None:
    with Staging() as staging:
        slab = staging.slab(8 * 2 + 4 * 4)
        first, second = slab.take((2, 4), torch.bfloat16), slab.take((4,), torch.float32)
        first.fill_(1)
        second.fill_(2)
        assert first.tolist() == [[1.0] * 4] * 2
        assert second.tolist() == [2.0] * 4
        staging.give_back(slab)


def test_what_fails_in_the_thread_is_raised_and_nothing_later_is_handed_on() -> None:
    later: list[int] = []

    def fail() -> None:
        raise ValueError("the disk is full")

    def use() -> None:
        with Staging() as staging:
            staging.hand_on(staging.slab(8), fail)
            for _ in range(50):
                staging.hand_on(staging.slab(8), lambda: later.append(1))

    with pytest.raises(ValueError, match="the disk is full"):
        use()
    assert not later


def test_leaving_with_an_error_ends_the_thread_without_handing_on() -> None:
    gate, done, used = threading.Event(), list[int](), list[Staging]()

    def use() -> None:
        with Staging() as staging:
            used.append(staging)
            staging.hand_on(staging.slab(8), gate.wait)
            staging.hand_on(staging.slab(8), lambda: done.append(1))
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert not done
    assert not used[0]._thread.is_alive()
