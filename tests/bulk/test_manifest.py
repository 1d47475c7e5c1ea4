import json
import os

import pytest
import torch

from cmfast import load
from cmfast.bulk import manifest

from .models import Network
from .processes import start, wait

SETTINGS = {"seed": 0, "levels": (80.0, 0.8)}
MAKER = {"torch": "2", "hardware": "one"}
#: Manifests with something else in the place of settings and versions.
NO_OBJECTS = [
    '{"format": "cmfast samples 1", "settings": [], "made_by": {}}',
    '{"format": "cmfast samples 1", "settings": null, "made_by": {}}',
    '{"format": "cmfast samples 1", "settings": {}, "made_by": 1}',
]


def test_it_is_written_once_and_compared(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert manifest.begin(folder, SETTINGS, MAKER) == []
    written = (folder / manifest.NAME).read_bytes()
    assert json.loads(written)["settings"] == {"seed": 0, "levels": [80.0, 0.8]}
    assert manifest.begin(folder, SETTINGS, MAKER) == []
    assert manifest.begin(folder, SETTINGS, MAKER | {"torch": "3"}) == ["torch 2 there, 3 here"]
    with pytest.raises(ValueError, match=r"other settings: seed 0 there, 1 here; new None there, 2 here$"):
        manifest.begin(folder, SETTINGS | {"seed": 1, "new": 2}, MAKER)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {manifest.NAME: written}


def test_of_several_processes_the_first_counts(tmp_path):
    """Those that begin at once with other settings are refused, all but one."""
    reading, writing = os.pipe()

    def begin(seed):
        os.read(reading, 1)
        manifest.begin(tmp_path / "out", {"seed": seed}, MAKER)

    processes = [start(lambda seed=seed: begin(seed)) for seed in range(6)]
    os.write(writing, b"x" * 6)
    statuses = [wait(process) for process in processes]
    os.close(reading)
    os.close(writing)
    assert sorted(statuses) == [0, 1, 1, 1, 1, 1]
    seed = json.loads((tmp_path / "out" / manifest.NAME).read_text())["settings"]["seed"]
    assert statuses[seed] == 0


def test_a_folder_of_other_files_is_not_taken(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"other files \(holiday.jpg\) and no manifest.json: give a new or empty"):
        manifest.begin(tmp_path, SETTINGS, MAKER)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_what_a_killed_process_left_is_no_other_file(tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    assert manifest.begin(tmp_path, SETTINGS, MAKER) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', "7", *NO_OBJECTS])
def test_a_damaged_manifest(tmp_path, text):
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest written by cmfast"):
        manifest.begin(tmp_path, SETTINGS, MAKER)


def test_another_formats_manifest(tmp_path):
    (tmp_path / manifest.NAME).write_text('{"format": "cmfast samples 9", "settings": {}, "made_by": {}}')
    with pytest.raises(ValueError, match="of the format 'cmfast samples 9', this version has 'cmfast samples 1'"):
        manifest.begin(tmp_path, SETTINGS, MAKER)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert manifest.begin(tmp_path, SETTINGS, MAKER) == []
    assert [p.name for p in tmp_path.iterdir()] == [manifest.NAME]
    assert json.loads((tmp_path / manifest.NAME).read_text())["made_by"] == MAKER
    draft = tmp_path / "draft"
    draft.write_text("another's")
    manifest._rename(draft, tmp_path / manifest.NAME)  # what was there a moment ago is not written over
    assert json.loads((tmp_path / manifest.NAME).read_text())["made_by"] == MAKER


def test_the_checksum_is_of_names_values_and_configuration():
    checksums = [manifest.weights_checksum(Network(weight)) for weight in (0.5, 0.5, 0.5001)]
    assert checksums[0] == checksums[1] != checksums[2]
    assert manifest.weights_checksum(Network().half()) != checksums[0]
    other = Network()
    other.register_buffer("buffer", torch.zeros(0))
    assert manifest.weights_checksum(other) != checksums[0]
    digits = load("digits").unet
    before = manifest.weights_checksum(digits)
    digits.config = type(digits.config)(**{**vars(digits.config), "num_heads": 7})
    assert manifest.weights_checksum(digits) != before
    with pytest.raises(ValueError, match="gave up its weights"):
        manifest.weights_checksum(Network().to("meta"))


def test_what_made_it():
    made_by = manifest.made_by(torch.device("cpu"))
    assert made_by["torch"] == torch.__version__
    assert set(made_by) == {"cmfast", "commit", "torch", "hardware"}
