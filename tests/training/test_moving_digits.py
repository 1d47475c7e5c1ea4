import torch

from cmfast.training.data import load_digits, load_moving_digits
from cmfast.training.data.moving_digits import reflected


def test_reflection():
    assert reflected(torch.arange(-5, 10), 4).tolist() == [3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, 1]


def test_digits_move_and_bounce():
    digits, clips = load_digits()[1], load_moving_digits(clips=2)[1]
    assert clips.images.shape == (718, 1, 8, 16, 16)
    assert clips.images.dtype == torch.float32
    assert torch.equal(clips.labels, digits.labels.repeat(2))
    assert torch.equal(clips.images, load_moving_digits(clips=2)[1].images)
    assert not torch.equal(clips.images[:359], clips.images[359:])
    places = clips.images[:, 0].unfold(2, 8, 2).unfold(3, 8, 2)  # [clips, frames, 5, 5, 8, 8]
    same = (places - digits.images.repeat(2, 1, 1, 1)[:, :, None, None]).abs().amax((4, 5)) < 0.005
    ink = digits.images.repeat(2, 1, 1, 1).flatten(1).add(1).sum(1)
    torch.testing.assert_close(clips.images.add(1).sum((1, 3, 4)), ink[:, None].expand(-1, 8), rtol=0.01, atol=0)
    assert same.flatten(2).any(2).all()  # each frame has the digit, at one of 25 places, and nothing else
    found = same.flatten(2).float().argmax(2)
    rows, columns = found // 5, found % 5
    for positions in (rows, columns):
        steps = positions.diff(dim=1)
        still = (steps == 0).all(1)
        assert (still | (steps.abs() == 1).all(1)).all()
        turns = steps[:, 1:] != steps[:, :-1]
        at_edge = (positions[:, 1:-1] == 0) | (positions[:, 1:-1] == 4)
        assert torch.equal(turns, at_edge & ~still[:, None])
        assert set(positions.unique().tolist()) == {0, 1, 2, 3, 4}
    assert not ((rows.diff(dim=1) == 0) & (columns.diff(dim=1) == 0)).any()
