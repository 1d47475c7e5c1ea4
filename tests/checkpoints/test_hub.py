"""Models of the Hugging Face hub, without a connection: a false download, and huggingface_hub's own cache."""

import builtins
import fnmatch
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import cmfast
from cmfast import CheckpointError, ConsistencyModel
from cmfast.checkpoints.hub import download, is_hub_id

from ..fixture_files import tiny_unet

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model():
    return ConsistencyModel(tiny_unet())


class FalseHub:
    """Repositories as folders; `snapshot_download` copies what the patterns ask for, as the real one does."""

    def __init__(self, root):
        self.root, self.cache, self.calls = root / "repositories", root / "cache", []

    def snapshot_download(self, repo_id, *, allow_patterns, **options):
        self.calls.append(options)
        repository = self.root / repo_id
        if not repository.is_dir():
            raise error("RepositoryNotFoundError")
        for path in repository.rglob("*"):
            name = str(path.relative_to(repository))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def downloaded(self):
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


def error(name):
    """One of huggingface_hub's, without the answer of a server that its constructor may want."""
    class_ = getattr(huggingface_hub.utils, name)
    return class_.__new__(class_)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FalseHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def diffusers_pipeline(model, folder):
    cmfast.checkpoints.write(model.checkpoint(), folder, "diffusers")
    return folder


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/diffusers-cd_imagenet64_l2", True),
        ("a/b.c-d_e", True),
        ("digits", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./b", False),
        ("../b", False),
        ("~/b", False),
        ("runs/cd.pt", False),
        ("runs/model.safetensors", False),
        ("a/b c", False),
        ("a/b--c", False),
    ],
)
def test_hub_ids(source, expected):
    assert is_hub_id(source) is expected


def test_our_own_folder(hub, model):
    folder = hub.root / "someone" / "model"
    model.save(folder)
    (folder / "optimizer.safetensors").write_bytes(b"large")
    options = {"revision": "v1", "token": "secret", "cache_dir": "x", "force_download": True, "local_files_only": True}
    loaded = cmfast.load("someone/model", **options)
    assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)
    assert all(call == options for call in hub.calls)
    assert hub.downloaded() == {"config.json", "model.safetensors"}
    assert hub.calls
    pretrained = ConsistencyModel.from_pretrained("someone/model", dtype=torch.bfloat16)
    assert pretrained.dtype == torch.bfloat16
    defaults = {"revision": None, "token": None, "cache_dir": None, "force_download": False, "local_files_only": False}
    assert hub.calls[-1] == defaults
    hub.calls.clear()
    download("someone/model")
    assert hub.calls
    assert all(call == defaults for call in hub.calls)


def test_a_pipeline_without_what_is_not_needed(hub, model):
    folder = diffusers_pipeline(model, hub.root / "someone" / "model")
    unet = folder / "unet"
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "flax_model.msgpack"):
        (unet / name).write_bytes(b"large")
    (folder / "README.md").write_text("card")
    cmfast.load("someone/model")
    assert hub.downloaded() == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("name", ["bin", "safetensors"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_other_weights_of_a_network(hub, model, name, variant):
    """Where there is no safetensors file, the pickled one; a variant where it is asked for."""
    unet = diffusers_pipeline(model, hub.root / "pipeline" / "model") / "unet"
    folder = unet.rename(hub.root / "network")
    folder = folder.rename(hub.root / "pipeline" / "network")
    stored = folder / "diffusion_pytorch_model.safetensors"
    mark = f".{variant}" if variant else ""
    target = folder / f"diffusion_pytorch_model{mark}.{name}"
    if name == "bin":
        torch.save(load_file(stored), target)
        stored.unlink()
    elif variant:
        stored.rename(target)
    loaded = cmfast.load("pipeline/network", variant=variant)
    assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)
    assert hub.downloaded() == {"config.json", target.name}
    if variant:
        with pytest.raises(FileNotFoundError, match="variant='fp16'"):
            cmfast.load("pipeline/network")


def test_shards(hub, model):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers_pipeline(model, hub.root / "someone" / "pipeline")
    network = diffusers.UNet2DModel.from_pretrained(pipeline, subfolder="unet")
    for variant in (None, "fp16"):
        network.save_pretrained(hub.root / "someone" / "shards", max_shard_size="200KB", variant=variant)
    for variant in (None, "fp16"):
        shutil.rmtree(hub.cache, ignore_errors=True)
        loaded = cmfast.load("someone/shards", variant=variant)
        assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)
        assert len(hub.downloaded()) > 3
        assert all(("fp16" in name) == (variant == "fp16") for name in hub.downloaded() - {"config.json"})


def test_weights_of_other_models_are_not_downloaded(hub):
    folder = hub.root / "someone" / "bert"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"large")
    with pytest.raises(CheckpointError, match="not a configuration written by cmfast or diffusers"):
        cmfast.load("someone/bert")
    assert hub.downloaded() == {"config.json"}
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="AutoencoderKL of diffusers"):
        cmfast.load("someone/bert")


def test_a_path_wins(hub, model, tmp_path):
    ConsistencyModel(tiny_unet(seed=1)).save(hub.root / "someone" / "model")
    model.save(tmp_path / "someone" / "model")
    loaded = cmfast.load("someone/model")
    assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)
    assert not hub.calls


def test_what_is_neither(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such path, and no such model on the Hugging Face hub"):
        cmfast.load("someone/nothing")
    for source in ("nothing", "some/file.pt", "a/b/c", tmp_path / "someone"):
        calls = len(hub.calls)
        with pytest.raises(FileNotFoundError, match=r"expected a path, one of digits, digits-teacher, .*, or an id"):
            cmfast.load(source)
        assert len(hub.calls) == calls


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        ("GatedRepoError", PermissionError, "is gated"),
        ("RepositoryNotFoundError", FileNotFoundError, "no such model on the Hugging Face hub"),
        ("RevisionNotFoundError", FileNotFoundError, "has no revision v9"),
        ("LocalEntryNotFoundError", FileNotFoundError, "not in the cache"),
        ("OfflineModeIsEnabled", FileNotFoundError, "not in the cache"),
    ],
)
def test_errors_of_the_hub(monkeypatch, raised, expected, message):
    def fail(*arguments, **options):
        raise error(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=message):
        cmfast.load("someone/model", revision="v9")


def test_without_huggingface_hub(monkeypatch, model, tmp_path):
    real = builtins.__import__

    def missing(name, *arguments):
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"there is no path someone/model;.*pip install 'cmfast\[hub\]'"):
        cmfast.load("someone/model")
    with pytest.raises(ImportError, match=r"pip install 'cmfast\[hub\]'"):
        model.push_to_hub("someone/model")
    model.save_pretrained(tmp_path)
    assert cmfast.load(tmp_path).unet.config == model.unet.config


@pytest.fixture
def cache(tmp_path, model):
    """huggingface_hub's cache with one model, as its downloads lay it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--someone--model"
    diffusers_pipeline(model, folder / "snapshots" / commit)
    for name in ("main", "v1"):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "v1", "0123456789abcdef0123456789abcdef01234567"])
def test_from_the_cache_alone(cache, model, revision):
    loaded = cmfast.load("someone/model", cache_dir=cache, local_files_only=True, revision=revision)
    assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)


def test_what_the_cache_has_not(cache):
    for name, options in (("someone/other", {}), ("someone/model", {"revision": "v2"})):
        with pytest.raises(FileNotFoundError, match=f"no model {name}.*not in the cache"):
            cmfast.load(name, cache_dir=cache, local_files_only=True, **options)


def test_offline_by_the_environment(cache, model, monkeypatch):
    """What HF_HUB_OFFLINE=1 sets where huggingface_hub is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = ConsistencyModel.from_pretrained("someone/model", cache_dir=cache)
    assert torch.equal(loaded.unet.out[2].bias, model.unet.out[2].bias)
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        cmfast.load("someone/other", cache_dir=cache)


def test_the_command_takes_a_hub_id(cache, tmp_path):
    """In a process of its own, with the variables that huggingface_hub's users set."""
    code = "import sys; from cmfast.cli import main; sys.argv[0] = 'cmfast'; main()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}

    def run(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)

    assert run("convert", "someone/model", "out").returncode == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["format"] == "cmfast"
    missing = run("sample", "--model", "someone/other", "--out", "a.png")
    assert (missing.returncode, "no model someone/other" in missing.stderr) == (2, True)


def test_push_to_hub(model, monkeypatch):
    said = {}

    class Api:
        def __init__(self, token=None):
            said["token"] = token

        def create_repo(self, repo_id, **options):
            said["create"] = (repo_id, options)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def upload_folder(self, *, folder_path, **options):
            said["files"] = sorted(path.name for path in folder_path.iterdir())
            said["weights"] = cmfast.load(folder_path).unet.out[2].bias
            said["upload"] = options
            return "https://huggingface.co/someone/model/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    options = {"commit_message": "First", "branch": "new", "create_pr": True, "ignore_patterns": "*.txt"}
    address = model.push_to_hub("model", private=True, token="secret", **options)
    assert address.endswith("/commit/1")
    assert said["token"] == "secret"
    assert said["create"] == ("model", {"private": True, "exist_ok": True})
    assert said["files"] == ["config.json", "model.safetensors"]
    assert torch.equal(said["weights"], model.unet.out[2].bias)
    assert said["upload"] == {
        "repo_id": "someone/model",
        "repo_type": "model",
        "commit_message": "First",
        "revision": "new",
        "create_pr": True,
        "allow_patterns": None,
        "ignore_patterns": "*.txt",
        "delete_patterns": None,
    }


def test_save_pretrained(model, monkeypatch, tmp_path):
    pushed = []
    monkeypatch.setattr(ConsistencyModel, "push_to_hub", lambda self, *a, **k: pushed.append((a, k)) or "address")
    assert model.save_pretrained(tmp_path / "mine") is None
    assert cmfast.load(tmp_path / "mine").unet.config == model.unet.config
    with pytest.raises(ValueError, match="private belong to push_to_hub=True"):
        model.save_pretrained(tmp_path / "mine", private=True)
    assert not pushed
    assert model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True) == "address"
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/other")
    assert pushed == [(("mine",), {"private": True}), (("someone/other",), {})]


def test_the_arguments_are_those_of_huggingface_hub():
    """All of its mixin's but those of its own model cards and configurations."""
    for name in ("push_to_hub", "save_pretrained"):
        ours = inspect.signature(getattr(ConsistencyModel, name)).parameters
        theirs = inspect.signature(getattr(huggingface_hub.ModelHubMixin, name)).parameters
        missing = {key for key, p in theirs.items() if p.kind is not p.VAR_KEYWORD} - set(ours)
        assert missing <= {"config", "model_card_kwargs"}
    taken = inspect.signature(ConsistencyModel.load).parameters
    theirs = inspect.signature(huggingface_hub.ModelHubMixin.from_pretrained).parameters
    first, *options = theirs
    assert first in inspect.signature(ConsistencyModel.from_pretrained).parameters
    assert {"revision", "token", "cache_dir", "force_download", "local_files_only"} <= set(options) & set(taken)
