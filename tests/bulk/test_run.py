import csv
import errno
import io
import json
import os
import random
import subprocess
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast import accelerate, load
from cmfast.bulk import FORMATS, Run, formats
from cmfast.bulk.threads import most_threads
from cmfast.pictures import to_pixels

from .models import files, model
from .processes import dying_at, kill, start, wait

COUNT, SIZE = 50, 8
SETTINGS = {"shard_size": SIZE, "batch_size": 4, "seed": 3, "first_sample": 5}


def run(folder, kind="npz", of=None, **settings):
    return Run(of or model(), folder, COUNT, format=kind, **{**SETTINGS, **settings})


@pytest.fixture(scope="module", autouse=True)
def _the_same_commit():
    """Asking git for it at each run would take longer than the run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cmfast.bulk.manifest.commit", lambda: "abc")
        yield


@pytest.fixture(scope="module")
def undisturbed(_the_same_commit, tmp_path_factory):
    """The files of a run, for each format, as one process makes them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in FORMATS:
        assert run(folder / kind, kind).work() == 7
    return {kind: files(folder / kind) for kind in FORMATS}


def test_npz(undisturbed, tmp_path):
    made = model().sample(COUNT, seed=3, first_sample=5)
    with zipfile.ZipFile(io.BytesIO(undisturbed["npz"]["00000005-00000012.npz"])) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    names = sorted(name for name in undisturbed["npz"] if name.endswith(".npz"))
    assert (names[0], names[-1]) == ("00000005-00000012.npz", "00000053-00000054.npz")
    shards = [np.load(io.BytesIO(undisturbed["npz"][name])) for name in names]
    assert [len(shard["samples"]) for shard in shards] == [8] * 6 + [2]
    np.testing.assert_array_equal(np.concatenate([s["samples"] for s in shards]), to_pixels(made).numpy())
    assert np.concatenate([s["labels"] for s in shards]).tolist() == [i % 10 for i in range(5, 55)]
    for path in (whole := run(tmp_path, dtype_out="float32")).folder.iterdir():
        assert path.name == "manifest.json"
    whole.work()
    values = np.concatenate([np.load(tmp_path / name)["samples"] for name in names])
    np.testing.assert_array_equal(values, made.numpy())


def test_png(undisturbed):
    made = to_pixels(model().sample(COUNT, seed=3, first_sample=5)).numpy()
    found = undisturbed["png"]
    for i in (0, 7, 8, 49):
        shard = f"{5 + i // 8 * 8:08}-{min(12 + i // 8 * 8, 54):08}"
        image = np.asarray(Image.open(io.BytesIO(found[f"{shard}/{5 + i:08}.png"])))
        np.testing.assert_array_equal(image, made[i, 0])
        rows = {
            row["file_name"]: row["label"] for row in csv.DictReader(found[f"{shard}/metadata.csv"].decode().split())
        }
        assert rows[f"{5 + i:08}.png"] == str((5 + i) % 10)
    assert len(found) == COUNT + 7 + 1


def test_tar(undisturbed):
    """WebDataset's conventions: the files of a sample have one stem, and lie beside one another."""
    made = to_pixels(model().sample(COUNT, seed=3, first_sample=5)).numpy()
    assert sorted(undisturbed["tar"]) == ["manifest.json", *(f"shard-{i:06}.tar" for i in range(7))]
    i = 0
    for k in range(7):
        with tarfile.open(fileobj=io.BytesIO(undisturbed["tar"][f"shard-{k:06}.tar"])) as archive:
            members = archive.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
            for group in zip(members[::3], members[1::3], members[2::3], strict=True):
                assert [m.name for m in group] == [f"{5 + i:08}.{suffix}" for suffix in ("png", "cls", "json")]
                image, label, about = (archive.extractfile(member).read() for member in group)
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), made[i, 0])
                assert int(label) == (5 + i) % 10
                assert json.loads(about) == {"index": 5 + i, "seed": 3, "label": (5 + i) % 10}
                i += 1
    assert i == COUNT


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 24), "float32"), ((3, 4, 6, 6), "uint8"), ((4, 6, 6), "float32"), ((3, 6, 6), "float32")]
)
def test_samples_that_are_no_pictures(tmp_path, shape, dtype):
    """Audio, video, latents, and images as numbers: arrays, and no labels where there are no classes."""
    of = model(shape, None)
    made = of.sample(COUNT, seed=3, first_sample=5)
    expected = (to_pixels(made) if dtype == "uint8" else made).numpy()
    given = {"dtype_out": "float32"} if shape == (3, 6, 6) else {}
    run(tmp_path / "npz", "npz", of, **given).work()
    run(tmp_path / "tar", "tar", of, **given).work()
    with np.load(tmp_path / "npz" / "00000005-00000012.npz") as shard:
        assert shard.files == ["samples"]
        assert shard["samples"].dtype == dtype
        np.testing.assert_array_equal(shard["samples"], expected[:8])
    with tarfile.open(tmp_path / "tar" / "shard-000001.tar") as archive:
        assert archive.getnames()[:3] == ["00000013.npy", "00000013.json", "00000014.npy"]
        np.testing.assert_array_equal(np.load(io.BytesIO(archive.extractfile("00000013.npy").read())), expected[8])
    with pytest.raises(ValueError, match=r"the format png holds uint8 images .* take npz or tar"):
        run(tmp_path / "png", "png", of, **given)
    if shape == (2, 24):
        with pytest.raises(ValueError, match=r"uint8 is for images and videos of 1 or 3 channels, not .* \[2, 24\]"):
            run(tmp_path / "png", "npz", of, dtype_out="uint8")
    assert not (tmp_path / "png").exists()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("processes", [2, 3])
def test_killed_at_any_moment_and_resumed(undisturbed, tmp_path, kind, processes):
    """Five times all processes are killed at random moments, then those of another number finish: the same files."""
    moments = random.Random(f"{kind} {processes}")
    seconds = 0.02

    def work(index, count):
        slow = run(tmp_path, kind)
        evaluate = slow._evaluate
        slow._evaluate = lambda *arguments: time.sleep(0.004) or evaluate(*arguments)
        slow.work(index, count)

    for _ in range(5):
        started = [start(lambda i=i: work(i, processes)) for i in range(processes)]
        time.sleep(moments.uniform(0, seconds) + 0.01)
        assert set(map(kill, started)) <= {-9, 0}
    there = {name: data for name, data in files(tmp_path).items() if not name.startswith(".")}
    assert there.items() <= undisturbed[kind].items()
    others = 5 - processes
    assert [wait(p) for p in [start(lambda i=i: work(i, others)) for i in range(others)]] == [0] * others
    assert files(tmp_path) == undisturbed[kind]


@pytest.mark.parametrize(("kind", "begun"), [("npz", False), ("png", True)])
def test_killed_at_each_use_of_the_file_system(undisturbed, tmp_path, kind, begun):
    """Whichever file is being opened, named, locked or removed: what is there is whole, and what was begun goes.

    Of the whole run, and of the shard alone.
    """
    n, killed = 0, True
    whole = {k: undisturbed[kind][k] for k in undisturbed[kind] if k.startswith(("mani", "00000053-"))}
    while killed:
        folder = tmp_path / str(n)
        there = run(folder, kind) if begun else None
        killed = wait(start(dying_at(n, lambda folder=folder, r=there: (r or run(folder, kind)).work(6, 7)))) == -9
        found = files(folder) if folder.exists() else {}
        assert {k: v for k, v in found.items() if not k.startswith(".")}.items() <= undisturbed[kind].items()
        run(folder, kind).work(6, 7)
        assert files(folder) == whole
        n += 1
    assert n > 10


def test_a_living_process_is_left_alone(undisturbed, tmp_path):
    """A second run in the same folder, while a first one writes, takes nothing from it."""
    (begun, begin), (ended, end) = os.pipe(), os.pipe()
    write = formats.FORMATS["npz"].write

    def first():
        slow = run(tmp_path)

        def held(*arguments):
            os.write(begin, b"x")
            os.read(ended, 1)
            write(*arguments)

        object.__setattr__(slow._format, "write", held)
        assert slow.work(0, 7) == 1

    process = start(first)
    os.read(begun, 1)
    second = run(tmp_path)
    (workplace,) = tmp_path.glob(".unfinished-*")
    os.write(end, b"x")
    assert wait(process) == 0
    assert not workplace.exists()
    assert second.work() == 6
    assert files(tmp_path) == undisturbed["npz"]
    for handle in (begun, begin, ended, end):
        os.close(handle)


@pytest.mark.parametrize("kind", FORMATS)
def test_two_processes_make_the_same_shard(undisturbed, tmp_path, kind):
    """Each finds it missing; the later one's takes the place of the first one's, or is left."""
    ours, theirs = run(tmp_path, kind), run(tmp_path, kind)
    evaluate = ours._evaluate
    ours._evaluate = lambda *arguments: (theirs.work(), evaluate(*arguments))[1]
    assert ours.make(0).name in {name.split("/")[0] for name in undisturbed[kind]}
    assert files(tmp_path) == undisturbed[kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk(undisturbed, tmp_path, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = {"npz": "size=16k", "png": "size=64k", "tar": "size=48k"}[kind]  # room for a few shards
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(OSError, match=r"No space left on device: '.*disk.*'") as caught:
            run(disk / "out", kind, dtype_out=None if kind == "png" else "float32").work()
        assert caught.value.errno == errno.ENOSPC
        there = files(disk / "out")
        assert "manifest.json" in there
        assert not any(name.startswith(".") for name in there)
        if kind == "png":
            assert there.items() < undisturbed["png"].items()
        assert len(there) > 1
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_that_gets_full(undisturbed, tmp_path, monkeypatch, kind):
    """The same without a disk: nothing of the shard is left, and it is made when there is space."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = "pathlib.Path.write_text" if kind == "png" else "cmfast.bulk.formats._flush"
    begun = run(tmp_path / "out", kind)
    with monkeypatch.context() as patched:
        patched.setattr(name, full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/out/.*0000") as caught:
            begun.work()
    assert caught.value.errno == errno.ENOSPC
    assert list(files(tmp_path / "out")) == ["manifest.json"]
    begun.work()
    assert files(tmp_path / "out") == undisturbed[kind]


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match=r"the folder cannot be made \((File exists|Not a directory)\)"):
            run(folder)
    with pytest.raises(OSError, match="the folder cannot be made"):
        run("/proc/none/out")
    run(tmp_path / "out").make(0)

    def refuse(*arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(PermissionError, match=r"no folder in which files can be made \(Permission denied\): '.*/out'"):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3 there, 4 here$"),
        ({"of": model(weight=0.6)}, "weights sha256:.* there, sha256:.* here$"),
        ({"steps": 2}, r"levels \[80.0\] there, \[80.0, .*\] here"),
        ({"class_labels": 3}, "class_labels in turn there, 3 here"),
        ({"batch_size": 8, "shard_size": 16}, "shard_size 8 there, 16 here; batch_size 4 there, 8 here"),
        ({"kind": "tar"}, "format npz there, tar here"),
        ({"dtype_out": "float32"}, "dtype_out uint8 there, float32 here"),
        ({"of": accelerate(model())}, "accelerated False there, True here"),
        ({"of": model().to(torch.float64)}, "weights .*; dtype float32 there, float64 here"),
    ],
)
def test_other_settings_are_refused(undisturbed, tmp_path, change, message):
    run(tmp_path).make(1)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has samples of other settings: {message}"):
        run(tmp_path, **change)
    assert files(tmp_path) == before
    assert run(tmp_path, steps=1, sampler="multistep").work() == 6  # the same, said otherwise
    assert files(tmp_path) == undisturbed["npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "jpg"}, "one of npz, png, tar, got 'jpg'"),
        ({"dtype_out": "int8"}, "uint8 or float32, got 'int8'"),
        ({"batch_size": 0}, "at least 1 sample, got 0"),
        ({"shard_size": 0}, "must be at least 1, got 50 and 0"),
        ({"seed": -1}, "seed must be in 0"),
        ({"class_labels": [1, 2]}, "or 50 of them"),
        ({"class_labels": 10}, "0 … 9, got 10"),
        ({"sampler": "plms"}, "unknown sampler"),
    ],
)
def test_a_bad_argument_makes_no_folder(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_none_makes_nothing(tmp_path):
    made = run(tmp_path / "out")
    for process, processes in ((1, 1), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"processes are numbered 0 … {processes - 1}, got {process}"):
            made.work(process, processes)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_large_images_are_compressed_by_threads(tmp_path, monkeypatch):
    """They are the same as those that one thread compresses."""
    of = model((1, 64, 64))
    names = set()
    encode = formats._png
    monkeypatch.setattr(formats, "_png", lambda image: names.add(threading.current_thread().name[:6]) or encode(image))
    Run(of, tmp_path / "a", 6, format="png", shard_size=4).work()
    assert names == {"compre"}
    monkeypatch.setattr("cmfast.bulk.run._SMALL", 1 << 13)
    names.clear()
    Run(of, tmp_path / "b", 6, format="png", shard_size=4).work()
    assert names == {"writer"}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    image = np.asarray(Image.open(tmp_path / "a" / "00000004-00000005" / "00000005.png"))
    np.testing.assert_array_equal(image, to_pixels(of.sample(6)).numpy()[5, 0])


def test_labels_for_all_or_one_a_sample(tmp_path):
    labels = [(7 * i) % 10 for i in range(COUNT)]
    for name, given, expected in (
        ("one", 4, [4] * COUNT),
        ("a number of numpy's", np.int64(4), [4] * COUNT),
        ("a tensor of one", torch.tensor(4, dtype=torch.int8), [4] * COUNT),
        ("each", labels, labels),
        ("tensor", torch.tensor(labels), labels),
        ("array", np.array(labels, dtype=np.uint8), labels),
    ):
        run(tmp_path / name, class_labels=given).work()
        shards = [np.load(path) for path in sorted((tmp_path / name).glob("*.npz"))]
        assert np.concatenate([s["labels"] for s in shards]).tolist() == expected
        made = to_pixels(model().sample(COUNT, seed=3, first_sample=5, class_labels=expected)).numpy()
        np.testing.assert_array_equal(np.concatenate([s["samples"] for s in shards]), made)
    continued = run(tmp_path / "tensor", class_labels=tuple(labels))
    assert continued.work() == 0
    settings = json.loads((tmp_path / "array" / "manifest.json").read_text())["settings"]
    assert settings["class_labels"] == labels
    assert Run(model(), tmp_path / "range", 10, class_labels=range(10)).work() == 1


def test_numbers_of_numpy(undisturbed, tmp_path):
    """They are Python's in the manifest; others than whole ones are refused before anything is written."""
    given = {name: np.int64(value) for name, value in SETTINGS.items()}
    Run(model(), tmp_path / "out", np.int32(COUNT), threads=np.int64(1), **given).work()
    assert files(tmp_path / "out") == undisturbed["npz"]
    for name in SETTINGS:
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            run(tmp_path / "none", **{name: 2.0})
    assert not (tmp_path / "none").exists()


def test_batches_have_one_size(tmp_path, monkeypatch):
    """Also at the end of a shard and of the run; but no sample has an index that noise has not."""
    sizes = []
    of = model()
    sample = of.sample
    monkeypatch.setattr(of, "sample", lambda count, **given: sizes.append(count) or sample(count, **given))
    run(tmp_path / "a", of=of, shard_size=10).work()
    assert sizes == [4] * 15
    sizes.clear()
    run(tmp_path / "b", of=of, first_sample=(1 << 32) - COUNT, shard_size=COUNT).work()
    assert sizes == [4] * 12 + [2]


def test_progress_counts_what_is_at_hand(tmp_path):
    told = []
    begun = run(tmp_path)
    begun.work(0, 4, lambda at_hand: told.append((at_hand, sum(begun.there()))))
    assert [at_hand for at_hand, _ in told[:2]] == [4, 8]
    assert told[-1] == (0, 16)
    assert all(at_hand <= 2 * SIZE for at_hand, _ in told)
    assert sorted(begun.there()) == [8, 8]
    assert begun.work(0, 4) == 0


@pytest.fixture
def digits():
    before = torch.get_num_threads()
    yield load("digits")
    torch.set_num_threads(before)


def test_the_number_of_threads_leaves_no_trace(tmp_path, digits):
    """On any number of cores: plain networks take one thread, accelerated ones all."""
    for name, of, batch in (("plain", digits, 10), ("fast", accelerate(digits), 3), ("alone", accelerate(digits), 1)):
        for threads in (1, 4):
            torch.set_num_threads(threads)
            Run(of, tmp_path / f"{name} {threads}", 10, batch_size=batch, dtype_out="float32").work()
            assert torch.get_num_threads() == threads
        assert files(tmp_path / f"{name} 1") == files(tmp_path / f"{name} 4")


def test_the_threads_of_plain_networks_are_a_setting(tmp_path, digits):
    fast = accelerate(digits)
    for threads in (1, 3):
        Run(fast, tmp_path / "fast", 10, batch_size=3, threads=threads)
        assert json.loads((tmp_path / "fast" / "manifest.json").read_text())["settings"]["threads"] == "any"
    run(tmp_path / "plain")
    with pytest.raises(ValueError, match="threads 1 there, 2 here"):
        run(tmp_path / "plain", threads=2)
    assert most_threads(digits) == 1
    assert most_threads(digits.to("meta")) is None
