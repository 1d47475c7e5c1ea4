"""`cmfast profile --from`: networks of the user's own."""

import json
import sys
import textwrap

import pytest

FILE = textwrap.dedent(
    """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x, shift=0.0):
            return self.conv(self.norm(x)) + shift

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            return self.second(self.second(self.first(x) + torch.randn_like(x)))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(x) + torch.randn_like(x)

    X = torch.randn(1, 8, 4, 4)
    pair = lambda: (Block(), (X.requires_grad_(),))
    triple = lambda: (Block().train(), [X], {"shift": 1.0})
    named = lambda: {"network": Block(), "args": (X,), "kwargs": {"shift": 1.0}}
    parts = lambda: (Draws(), (X,))
    drops = lambda: (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.5)).train(), (X,))
    alone = lambda: Block()
    bare_tensor = lambda: (Block(), X)
    no_module = lambda: (torch.relu, (X,))
    no_names = lambda: (Block(), (X,), {3: X})
    other_names = lambda: {"model": Block(), "args": (X,)}
    four = lambda: (Block(), (X,), {}, 1)
    nothing = lambda: None
    takes = lambda width: None
    misfit = lambda: (Block(), (X[:, :3],))
    bare = lambda: (Bare(), (X,))
    double = lambda: (Block().double(), (X,))

    def raises():
        return len(
            3
        ) + 1
    """
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)
    (tmp_path / "networks.py").write_text(FILE)
    (tmp_path / "package_to_profile").mkdir()
    (tmp_path / "package_to_profile" / "networks.py").write_text(FILE)
    yield tmp_path
    for name in sys.modules.keys() - modules.keys():
        if "profile" in name:
            del sys.modules[name]


@pytest.mark.parametrize(
    "source",
    ["networks.py:pair", "networks.py:triple", "networks.py:named", "package_to_profile.networks:pair"],
)
def test_a_network_is_profiled(cmfast, folder, source):
    status, out, err = cmfast("profile", "--from", source, "--rounds", 1, "--json", "a.json")
    assert status == 0, err
    assert out.startswith(f"{source}, float32 products, ")
    assert "conv 3x3 at 4 x 4" in out
    assert "captured" not in out
    found = json.loads((folder / "a.json").read_text())
    assert found["settings"].items() >= {"network": source, "dtype": "float32"}.items()
    assert found["not_captured"] == {}
    assert "batch_size" not in found["settings"]
    assert {row["module"] for row in found["rows"][:-1]} == {""}
    assert {row["layer"] for row in found["rows"] if row["operator"] == "conv2d"} == {"conv"}
    assert "conv2d" in {row["operator"] for row in found["rows"]}


def test_it_is_explained_and_measured_without_passes(cmfast, folder):
    arguments = ("--explain", "--passes", "--tune", "--dtype", "bfloat16", "--rounds", 1)
    status, out, err = cmfast("profile", "--from", "networks.py:pair", *arguments)
    assert status == 0, err
    assert out.startswith("networks.py:pair, bfloat16 products, ")
    assert "captured: the network as a whole\n" in out
    assert "group_norms: 1 times. A group norm before convolutions" in out
    assert "without group_norms: " in out


def test_a_network_in_its_parts(cmfast, folder):
    arguments = ("--explain", "--rounds", 1, "--json", "a.json")
    status, out, err = cmfast("profile", "--from", "networks.py:parts", *arguments)
    assert status == 0, err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("first.", "second."))}
    assert rows["first.conv"][0] == "1"
    assert rows["second.conv"][0] == "2"
    assert "\naten.rand_like (torch) " in out or "\naten.randn_like (torch) " in out
    assert {"captured: first", "captured: second, 2 calls"} <= set(out.splitlines())
    assert "\nnot captured: the network as a whole, the network draws random num" in out
    found = json.loads((folder / "a.json").read_text())
    assert [row["module"] for row in found["rows"] if row["operator"] == "conv2d"] == ["first", "second", "second"]
    drawn = next(row for row in found["rows"] if row["operator"] == "aten.randn_like")
    assert (drawn["module"], drawn["layer"]) == (None, "")
    assert "draws random numbers" in found["not_captured"][""]
    assert sum(row["seconds"] for row in found["rows"]) >= found["seconds"] * (1 - 1e-9)  # what is left is outside


def test_a_network_as_torch_runs_it(cmfast, folder):
    status, out, err = cmfast("profile", "--from", "networks.py:bare", "--eager", "--rounds", 1)
    assert status == 0, err
    assert out.startswith("networks.py:bare, torch, ")
    assert "aten.convolution 1x1 at 4 x 4 " in out
    status, out, _ = cmfast("profile", "--from", "networks.py:drops", "--eager", "--rounds", 1)
    assert status == 0
    assert "dropout" not in out  # it is evaluated
    status, _, err = cmfast("profile", "--from", "networks.py:pair", "--eager", "--dtype", "bfloat16")
    assert status == 2
    assert "--eager takes the network of --from in its own dtype: it does not go with --dtype\n" in err


def test_modules_beside_the_file_are_found(cmfast, folder, tmp_path):
    (folder / "below").mkdir()
    (folder / "below" / "beside_to_profile.py").write_text(FILE)
    (folder / "below" / "uses.py").write_text("from beside_to_profile import pair\n")
    status, _, err = cmfast("profile", "--from", "below/uses.py:pair", "--rounds", 1)
    assert status == 0, err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("networks.py", "--from must be FILE.py:FUNCTION or package.module:function, got networks.py"),
        ("networks.py:", "--from must be FILE.py:FUNCTION or package.module:function, got networks.py:"),
        ("none.py:pair", "--from: there is no file none.py"),
        ("no_package.networks:pair", "--from: there is no module no_package"),
        ("package_to_profile.none:pair", "--from: there is no module package_to_profile.none"),
        ("networks.py:none", "--from: networks.py has no function none"),
        ("networks.py:X.y", "--from: networks.py has no function X.y"),
        ("networks.py:__name__", "--from: networks.py has no function __name__"),
        ("networks.py:raises", "networks.py:raises raised TypeError: object of type 'int' has no len() (line "),
        ("networks.py:takes", "networks.py:takes raised TypeError: <lambda>() missing 1 required positional argument"),
        ("networks.py:alone", "(network, args), (network, args, kwargs) or a dict of these, got Block"),
        ("networks.py:four", "or a dict of these, got tuple of 4"),
        ("networks.py:nothing", "or a dict of these, got None"),
        ("networks.py:other_names", "or a dict of these, got dict of model, args"),
        ("networks.py:bare_tensor", "must return the arguments of the call as a tuple, got Tensor"),
        ("networks.py:no_names", "must return the keyword arguments as a dict by name, got dict of 3"),
        ("networks.py:no_module", "must return a torch.nn.Module as the network, got builtin_function_or_method"),
        ("networks.py:misfit", "the network of networks.py:misfit raised RuntimeError: "),
        ("networks.py:bare", "the network of networks.py:bare raised CaptureError: the network draws random numbers"),
        ("networks.py:double", "float64 networks are not accelerated"),
    ],
)
def test_errors_are_one_line(cmfast, folder, source, message):
    status, out, err = cmfast("profile", "--from", source)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("cmfast: ")
    assert err.count("\n") == 1


def test_errors_say_where_they_were_raised(cmfast, folder):
    lines = FILE.splitlines()
    for name, text in (("raises", "return len("), ("misfit", "return self.conv(self.norm(x)) + shift")):
        line = next(i for i, found in enumerate(lines, 1) if text in found)
        assert f"(line {line} of {folder / 'networks.py'})" in cmfast("profile", "--from", f"networks.py:{name}")[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport no_such_module\n", "raised ModuleNotFoundError: No module named 'no_such_module' (line 2 of "),
        ("x = (\n", "raised SyntaxError: "),
        ("raise SystemExit('usage')\n", "raised SystemExit: usage (line 1 of "),
    ],
)
def test_files_that_cannot_be_imported(cmfast, folder, text, message):
    for place, path in (("broken.py", "broken.py"), ("broken_to_profile", "broken_to_profile.py")):
        (folder / path).write_text(text)
        status, _, err = cmfast("profile", "--from", f"{place}:pair")
        assert status == 2
        assert f"--from: {place} {message}" in err


def test_options_of_models_are_refused(cmfast, folder):
    for given, named in (
        (("--model", "digits"), "--model"),
        (("--network", "lsun256", "--batch-size", 1), "--network, --batch-size"),
        (("--device", "cpu", "--steps", 3), "--device, --steps"),
    ):
        status, _, err = cmfast("profile", "--from", "networks.py:pair", *given)
        assert status == 2
        assert f"--from has its own network and inputs: it does not go with {named}\n" in err
