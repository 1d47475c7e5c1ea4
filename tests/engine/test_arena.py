import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast.engine.arena import LINE, Buffer, plan, view

BUFFERS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 20), st.integers(0, 8)), max_size=30)


@given(BUFFERS)
def test_what_lives_together_lies_apart(sizes):
    buffers = [Buffer(torch.empty(n, device="meta"), first, first + length) for n, first, length in sizes]
    total = plan(buffers)
    for i, a in enumerate(buffers):
        assert a.offset % LINE == 0
        assert a.offset + a.bytes <= total
        for b in buffers[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    most = max((sum(b.bytes for b in buffers if b.first <= t <= b.last) for t in range(30)), default=0)
    assert most <= total <= sum(b.bytes for b in buffers)


def test_memory_is_used_again():
    buffers = [Buffer(torch.empty(1000, device="meta"), i, i + 1) for i in range(10)]
    assert plan(buffers) == 2 * buffers[0].bytes


def test_views_keep_their_place_in_a_buffer():
    buffer = Buffer(torch.empty(2, 3, 4, device="meta"), 0, 0, offset=128)
    memory = torch.arange(1024, dtype=torch.uint8)
    like = buffer.base.transpose(1, 2)[1, 2:]
    found = view(memory, buffer, like)
    expected = memory[128:].view(torch.float32)[:24].view(2, 3, 4).transpose(1, 2)[1, 2:]
    assert found.stride() == like.stride()
    assert found.data_ptr() == expected.data_ptr()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
