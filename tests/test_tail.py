"""Leases on a growing tail: in place while alone, a copy when another handle reads beyond."""

import pytest
import torch

from attnpack_fx import windows
from attnpack_fx.kernels.parts import SPARE_ROWS
from attnpack_fx.tail import TailBuffer, allocate, exact


def buffer_of(length):
    return allocate(torch.arange(float(length)).view(-1, 1, 1, 1), length)


def test_extending_alone_stays_in_the_buffer():
    buffer = buffer_of(3)
    assert buffer.lease(3).buffer.extend(buffer.lease(3), 2).buffer is buffer


def test_extending_past_another_lease_copies():
    buffer = buffer_of(3)
    first = buffer.lease(3)
    longer = buffer.extend(first, 1)
    fork = buffer.extend(first, 1)
    assert longer.buffer is buffer and fork.buffer is not buffer
    torch.testing.assert_close(fork.buffer.rows[:3], buffer.rows[:3])


def test_a_dead_lease_frees_its_rows():
    buffer = buffer_of(3)
    first = buffer.lease(3)
    longer = buffer.extend(first, 1)
    del longer
    assert buffer.extend(first, 1).buffer is buffer


def test_growth_keeps_rows_and_leaves_room():
    lease = TailBuffer(torch.ones(4, 1, 1, 1)).lease(4)
    grown = lease.buffer.extend(lease, 1)
    assert grown.buffer is not lease.buffer
    assert grown.buffer.capacity >= 5 + SPARE_ROWS
    torch.testing.assert_close(grown.buffer.rows[:4], torch.ones(4, 1, 1, 1))


def test_growth_copies_each_row_a_bounded_number_of_times():
    lease, copied = TailBuffer(torch.empty(0, 1, 1, 1)).lease(0), 0
    for _ in range(4000):
        longer = lease.buffer.extend(lease, 1)
        copied += lease.length if longer.buffer is not lease.buffer else 0
        lease = longer
    assert copied < 6 * 4000
    assert lease.buffer.capacity < 1.3 * lease.length


def test_visible_rows_share_memory_and_hide_the_capacity():
    buffer = buffer_of(3)
    visible = buffer.lease(3).visible()
    assert visible.shape[0] == 3 + SPARE_ROWS
    assert visible.data_ptr() == buffer.rows.data_ptr()
    assert not visible._is_view()


def test_exact_takes_no_room_until_it_grows():
    rows = torch.arange(6.0).view(3, 2, 1, 1)
    lease = exact(rows)
    assert lease.buffer.rows is rows and lease.length == 3
    longer = lease.buffer.extend(lease, 1)
    assert longer.buffer is not lease.buffer and longer.buffer.capacity >= 4 + SPARE_ROWS
    torch.testing.assert_close(longer.buffer.rows[:3], rows)


@pytest.mark.parametrize(("tokens", "expected"), [(62, None), (63, 8), (500, 8)])
def test_a_full_window_asks_for_little_room(tokens, expected):
    assert windows.room(tokens, 63) == expected


def test_a_buffer_grows_by_the_room_it_is_given():
    lease = TailBuffer(torch.zeros(63, 1, 1, 4), room=8).lease(63)
    grown = lease.buffer.extend(lease, 1).buffer
    assert grown.capacity == 64 + 8 + SPARE_ROWS
    # Of these rows nothing is known any more.
    assert TailBuffer(torch.zeros(63, 1, 1, 4)).room is grown.room is None
