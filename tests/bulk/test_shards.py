import pytest

from cmfast.bulk import Shards


@pytest.mark.parametrize(("first", "samples", "size"), [(0, 10, 3), (5, 9, 3), (7, 1, 4), (0, 12, 1)])
def test_each_sample_is_in_one_shard(first, samples, size):
    shards = Shards(first, samples, size)
    found = [i for shard in shards for i in range(shard.first_sample, shard.last_sample + 1)]
    assert found == list(range(first, first + samples))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(shard.count == size for shard in list(shards)[:-1])


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_each_shard_is_in_one_share(processes):
    shards = Shards(0, 50, 10)
    shares = [list(shards.share(i, processes)) for i in range(processes)]
    assert sorted((s for share in shares for s in share), key=lambda s: s.index) == list(shards)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 0, 4), "at least 1, got 0 and 4"), ((0, 4, 0), "got 4 and 0"), ((-1, 4, 4), "got -1 … 2")],
)
def test_shards_that_cannot_be(numbers, message):
    with pytest.raises(ValueError, match=message):
        Shards(*numbers)


def test_the_last_index():
    assert Shards((1 << 32) - 4, 4, 3)[1].last_sample == (1 << 32) - 1
    with pytest.raises(ValueError, match="in 0 … 4294967295"):
        Shards((1 << 32) - 4, 5, 3)
    with pytest.raises(IndexError, match="numbered 0 … 1, got 2"):
        Shards(0, 4, 3)[2]
