import pytest
import torch
from safetensors.torch import load_file, save_file

from cmfast.engine.cpu.cache import Stored, fingerprint, write


@pytest.fixture
def threads():
    """Set how many there are; afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_fingerprint_tells_apart_all_that_is_packed():
    w = torch.randn(4, 6)
    given = [
        ({"w": w}, ["w"], torch.float32),
        ({"w": w + 1}, ["w"], torch.float32),
        ({"w": w.reshape(6, 4)}, ["w"], torch.float32),  # the same bytes
        ({"w": w.reshape(24)}, ["w"], torch.float32),
        ({"w": w.view(torch.int32)}, ["w"], torch.float32),
        ({"v": w}, ["w"], torch.float32),
        ({"w": w, "v": w}, ["w"], torch.float32),
        ({"w": w}, ["w transposed"], torch.float32),
        ({"w": w}, ["w", "w transposed"], torch.float32),
        ({"w": w}, ["w"], torch.bfloat16),
    ]
    assert len({fingerprint(*one) for one in given}) == len(given)


def test_a_fingerprint_is_the_same_wherever_the_weights_lie(threads):
    w = torch.randn(400, 600)
    expected = fingerprint({"w": w}, ["w"], torch.float32)
    assert fingerprint({"w": torch.nn.Parameter(w.t().contiguous().t())}, ["w"], torch.float32) == expected
    threads(3)
    assert fingerprint({"w": w.clone()}, iter(["w"]), torch.float32) == expected
    assert len(expected) == 32


@pytest.mark.parametrize("count", [1, 3])
def test_weights_come_back_as_they_were_written(tmp_path, threads, count):
    threads(count)
    packed = {"a": torch.randn(1001), "b": torch.randn(3, 7).bfloat16(), "c": torch.randn(2)}
    write(tmp_path / "w.safetensors", packed)
    stored = Stored(tmp_path / "w.safetensors")
    for name, tensor in packed.items():
        assert name in stored
        found = stored.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.flatten())
        assert found.data_ptr() % 64 == 0 or name == "c"  # which comes after one that ends within a cache line
    assert "d" not in stored
    assert all(torch.equal(packed[name], t) for name, t in load_file(tmp_path / "w.safetensors").items())


def test_a_file_that_is_not_there_has_no_weights(tmp_path):
    assert "a" not in Stored(tmp_path / "w.safetensors")


def test_files_of_something_else_are_said(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"w.safetensors is not a whole file of packed weights .*: delete it"):
        Stored(path)
    save_file({"a": torch.zeros(3, dtype=torch.int64)}, path)  # a dtype that nothing is packed in
    with pytest.raises(ValueError, match=r"not a whole file of packed weights"):
        Stored(path)
