"""The documentation: every block of code runs, every public name has its reference, the README is short.

The blocks of a page run in order, those of Python in one namespace, all in one folder; `_NEEDS` has what its reader has
already: networks, files, a hub. Of blocks of sh and of consoles each `cmfast` command runs; `_SMALLER` says with which
options to make it quick. The commands of `_PARSED` and of other programs are held to the options and files that they
name.
"""

import contextlib
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import typer
from cmfast.kernels import backends
from torch import nn

from cmfast import ConsistencyModel
from cmfast.benchmarking import ceilings
from cmfast.cli import app
from cmfast.engine import passes

from .benchmarking import tiny
from .documentation import PAGES, ROOT, Block, blocks, command_lines, expected_output, shows
from .fixture_files import tiny_unet

BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_no_block_is_of_an_unknown_kind(block):
    assert block.kind in ("python", "sh", "console")
    assert block.text.strip()
    assert not block.title or block.kind == "python"


# ---- Python


class Network(nn.Module):
    """What a reader may have: a network of images, times, and a context."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.norm, self.row = nn.GroupNorm(8, 32), nn.Linear(16, 32)

    def forward(self, x, timesteps, class_labels=None, context=None, return_dict=True):
        h = self.first(x) + 1e-3 * timesteps.reshape(-1, 1, 1, 1)
        h = h if context is None else h + self.row(context["text"])[:, :, None, None]
        y = self.last(nn.functional.silu(self.norm(h)))
        return y if return_dict else (y,)


def a_network(namespace, monkeypatch):
    namespace |= {"network": Network().eval(), "x": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3.0, 500.0])}
    namespace["embedding"] = torch.randn(2, 16)


def a_pipeline(namespace, monkeypatch):
    """The hub's pipeline is a small one of random weights, and a LoRA for it is in the folder "folder"."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from .engine import tiny_pipelines

    def pretrained(name):
        assert name == "SimianLuo/LCM_Dreamshaper_v7"
        return tiny_pipelines.pipeline(tiny=True)

    trained = pretrained("SimianLuo/LCM_Dreamshaper_v7")
    trained.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(trained.unet)
    type(trained).save_lora_weights("folder", unet_lora_layers=layers)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", pretrained)


def checkpoints(namespace, monkeypatch):
    """OpenAI's file, diffusers' folder and a model on the hub: small ones, of as many classes."""
    from cmfast.checkpoints import write

    model = a_model()
    write(model.checkpoint(), Path("pipeline-folder"), "diffusers")
    weights = Path("pipeline-folder/unet/diffusion_pytorch_model.safetensors")
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    released = ConsistencyModel(tiny_unet(image_size=64, channel_mult=(1, 2, 3, 4), attention_resolutions=()))
    write(released.checkpoint(), Path("cd_imagenet64_l2.pt"), "openai")


def a_model():
    """A small one of colours, with as many classes as ImageNet has."""
    return ConsistencyModel(tiny_unet(in_channels=3, out_channels=3, num_classes=1000))


def a_hub(namespace, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from cmfast.checkpoints import write

    def snapshot_download(repo_id, **options):
        assert repo_id == "openai/diffusers-cd_imagenet64_l2"
        if not Path("hub").exists():
            write(a_model().checkpoint(), Path("hub"), "diffusers")
        return "hub"

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)


def a_backend(namespace, monkeypatch):
    """The page's pattern and backend are to be left out of the engine, and of `auto`, once it has run."""
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS[:-1], "numpy", "reference"))
    monkeypatch.setattr(backends, "_module", backends._module.__wrapped__)  # not what it has kept
    order = dict(passes.PASSES)
    monkeypatch.setattr(passes, "PASSES", passes.PASSES)

    def again():
        passes.PASSES.clear()
        passes.PASSES.update(order)

    return again


_NEEDS = {
    "README.md": (a_pipeline,),
    "docs/drop-in.md": (a_network, a_pipeline),
    "docs/models.md": (a_network, checkpoints),
    "docs/extending.md": (a_backend,),
}


def run(block: Block, namespace):
    """Execute a block, with the page's lines in tracebacks."""
    exec(compile("\n" * block.line + block.text, ROOT / block.page, "exec"), namespace)


def a_module(path, modules, monkeypatch):
    """The module of a file that the page begins, importable by its name."""
    if path in modules:
        return modules[path]
    name = f"cmfast.{path.removesuffix('/__init__.py').removesuffix('.py').replace('/', '.')}"
    module = types.ModuleType(name)
    module.__package__ = name
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
    return module


# ---- commands

#: Commands that begin with these words take seconds with these options after their own.
_SMALLER = {
    "cmfast sample --model digits --accelerate --count 100000": "--count 1024",
    "cmfast sample --accelerate --count 100000": "--count 1024",
    "cmfast profile --from": "--rounds 3",
    "cmfast profile --explain": "--rounds 1",
    "cmfast profile --eager": "--rounds 1",
    "cmfast profile --steps": "--rounds 1",
    "cmfast bench operators": "--ops timestep_embedding --passes 1 --rounds 1",
    "cmfast bench latency": "--rounds 1 --batch-size 2 --consistency-steps 1 --steps 2 --samplers euler",
    "cmfast eval": "--count 20 --resamples 2",
    "cmfast train --method diffusion": "--set network.model_channels=32 --set loop.iterations=2 "
    "--set loop.batch_size=4",
    "cmfast train --method distillation": "--set loop.iterations=2 --set loop.batch_size=4",
}

#: Commands that begin with these words are too long for a test: their options are read, and their files looked for.
_PARSED = (
    "cmfast profile --plan H100 --network imagenet64",
    "cmfast profile --network imagenet64",
    "cmfast bench model",
    "cmfast bench latency --network",
    "cmfast bench all",
    "cmfast bench show",
    "cmfast train --recipe",
    "cmfast train --method easy-consistency-tuning",
    "cmfast eval --model runs/tuned",
    "cmfast kernels",
    "cmfast serve",
)


def a_desk():
    """Files that the pages' commands begin with."""
    from PIL import Image

    for name, colour in (("F.png", 90), ("photo.png", 120)):
        Image.new("RGB", (20, 16), (colour, 60, 200)).save(name)
    mask = Image.new("L", (8, 8), 255)
    mask.paste(0, (0, 0, 4, 8))
    mask.save("M.png")
    for i in range(4):
        picture = Path("images", "ab"[i % 2], f"{i}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (60 * i, 60, 200)).save(picture)
    Path("examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples" / "your_own_network.py", "FILE.py")


def called(line, cmfast):
    """Do what a line says as far as a test can; what cmfast printed."""
    words = shlex.split(line, comments=True)
    words = words[:-1] if words[-1] == "&" else words
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "torchrun":
        assert "cmfast" in arguments, f"torchrun runs what? {line}"
        arguments = arguments[arguments.index("cmfast") + 1 :]
    if program in ("cmfast", "torchrun"):
        return command([replaced(word) for word in arguments], cmfast)
    _OTHERS[program](arguments)
    return ""


def replaced(word):
    """A word of a command with what a reader would write in its place."""
    return word.replace("FILE.py:FUNCTION", "FILE.py:example")


def command(arguments, cmfast):
    """Run a command of cmfast, smaller than it stands, or read its options where it is one of _PARSED."""
    line = " ".join(["cmfast", *arguments])
    if line.startswith(_PARSED):
        parsed(arguments)
        return ""
    more = next((more for begin, more in _SMALLER.items() if line.startswith(begin)), "")
    status, out, err = cmfast(*arguments, *more.split())
    slower = "--compare" in arguments and status == 1  # of two runs of a moment
    assert status == 0 or slower, f"{line}\n{out}{err}"
    return out


def parsed(arguments):
    """Let the command read its arguments; SystemExit or a usage error where it cannot."""
    found, context, words = typer.main.get_command(app), None, list(arguments)
    while hasattr(found, "commands"):
        context = found.make_context(found.name, words[:1], parent=context, ignore_unknown_options=False)
        assert words[0] in found.commands, f"there is no command {words[0]} of {found.name}"
        found, words = found.commands[words[0]], words[1:]
    found.make_context(found.name, words, parent=context)


def of_pip(arguments):
    """What pip is to install is this package with extras that it has, or a package that the project pins."""
    assert arguments[0] == "install"
    listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[", listed, re.MULTILINE)
    pinned = re.findall(r"^[\w-]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for wanted in (word for word in arguments[1:] if not word.startswith("-")):
        name, extra = re.fullmatch(r"([\w.-]+?)(?:\[([\w,-]+)\])?", wanted).groups()
        assert name in (".", "cmfast") or (name in pinned and extra is None), f"{wanted} is neither ours nor pinned"
        assert not extra or set(extra.split(",")) <= set(extras), f"there is no extra {extra}"


def of_python(arguments):
    """A line of Python runs; of a program of ours, its file is there and has the options."""
    if arguments[0] == "-c":
        exec(compile(arguments[1], "python -c", "exec"), {})
        return
    at = 1 if arguments[0] == "-m" else 0
    path = ROOT / (f"{arguments[1].replace('.', '/')}.py" if at else arguments[0])
    source = path.read_text()
    for option in (word for word in arguments[at + 1 :] if word.startswith("--")):
        assert f'"{option}"' in source, f"{path.name} has no option {option}"


def of_make(arguments):
    """The targets are the Makefile's."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(word in targets or "=" in word for word in arguments), f"there is no target {arguments}"


def of_files(arguments):
    """A program of others: the files of this repository that it is given are there."""
    files = [word for word in arguments if "/" in word]
    assert files
    assert all((ROOT / file).exists() for file in files), f"{files} are not there"


_OTHERS = {
    "pip": of_pip,
    "python": of_python,
    "python3": of_python,
    "make": of_make,
    "wait": lambda arguments: None,
    "kubectl": of_files,
    "sbatch": of_files,
}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("cmfast sample --out a.png --no-such-option", AssertionError),
        ("cmfast train --recipe digits --no-such-option x", Exception),
        ("cmfast bench all --outt results", Exception),
        ("pip install '.[no-such-extra]'", AssertionError),
        ("make no-such-target", AssertionError),
        ("python examples/no_such_file.py", FileNotFoundError),
        ("python examples/your_own_network.py --no-such-option", AssertionError),
        ("curl somewhere", KeyError),
    ],
)
def test_a_command_that_is_none_is_noticed(line, error, cmfast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        called(line, cmfast)


def test_what_a_console_shows():
    shown = "a 1.5 of 3 conv2d\n...\nlast line, ...\n"
    assert shows(shown, "a 4e-05 of 3 conv2d\nx\ny\nlast   line, and more\nrest")
    assert not shows(shown, "b 1.5 of 3 conv2d\nx\nlast line, and more")
    assert not shows(shown, "a 1.5 of 4 conv2d\nx\nlast line, and more")
    assert not shows(shown, "a 1.5 of 3 conv3d\nx\nlast line, and more")
    assert not shows(shown, "a 1.5 of 3 conv2d\nx\nlast word, and more")
    assert shows("on 2 threads of AMD EPYC: 1.5 ms", "on 1 thread of Intel(R) Xeon: 22.5 ms")


def test_blocks_are_found():
    text = 'a\n```python title="a.py"\nx = 1\n```\n\n~~~sh\nls\n~~~\n'
    assert [(b.kind, b.title, b.line, b.text) for b in blocks("p", text)] == [
        ("python", "a.py", 2, "x = 1\n"),
        ("sh", "", 6, "ls\n"),
    ]
    with pytest.raises(ValueError, match="p:1: this block does not end"):
        blocks("p", "```sh\nls\n")
    with pytest.raises(ValueError, match="p:1: expected title"):
        blocks("p", "```python no-test\nx\n```\n")


# ---- blocks


#: Their commands start processes, and are run or played in tests/bulk/test_docs.py and tests/serving/test_http.py.
_ELSEWHERE = {"docs/bulk.md", "docs/serving.md"}


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS} - _ELSEWHERE))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys, cmfast):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib.import_module("cmfast.cli.bench.operators"), "calls", tiny.calls)
    monkeypatch.setitem(ceilings.BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 16)
    torch.manual_seed(0)
    a_desk()
    namespace, modules = {"__name__": "__page__"}, {}
    with contextlib.ExitStack() as after:
        for need in (a_hub, *_NEEDS.get(page, ())):
            after.callback(need(namespace, monkeypatch) or (lambda: None))
        for block in (block for block in BLOCKS if block.page == page):
            capsys.readouterr()
            if block.kind != "python":
                run_commands(block, cmfast)
            elif not block.title:
                run(block, namespace)
            elif (ROOT / block.title).exists():
                assert block.text in (ROOT / block.title).read_text(), f"{block} is not in {block.title}"
            else:  # a file of the reader's
                run(block, vars(modules.setdefault(block.title, a_module(block.title, modules, monkeypatch))))


def run_commands(block: Block, cmfast):
    """Run a block of commands; a console must show what they print."""
    printed = "".join(called(line, cmfast) for line in command_lines(block))
    if block.kind == "console":
        assert shows(expected_output(block), printed), f"{block}: the command prints\n{printed}"


# ---- the pages


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
            # MkDocs, which is strict, looks for the pages of the navigation.
            assert (ROOT / link).exists() or f": {link.removeprefix('docs/')}\n" in navigation, f"{page}: {link}"


PACKAGES = ("", "kernels", "sampling", "preconditioning", "training", "evaluation", "engine")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_has_its_reference(name):
    module = importlib.import_module(f"cmfast.{name}" if name else "cmfast")
    public = getattr(module, "__all__", None)
    if public is None:  # a file: its classes
        public = [n for n, value in vars(module).items() if n[0] != "_" and module.__name__ in vars_module(value)]
    text = (ROOT / "docs" / "reference" / f"{name or 'cmfast'}.md").read_text()
    documented = set(re.findall(r"^::: [\w.]+\.(\w+)$", text, re.MULTILINE))
    wanted = {n for n in public if callable(getattr(module, n))} - {"load"}  # ConsistencyModel's, as the page says
    assert wanted
    assert wanted <= documented


def vars_module(value):
    """The module that a class is of; nothing for anything else."""
    return (value.__module__,) if isinstance(value, type) else ()


def hook(name):
    """A module of MkDocs' hooks, by its file in docs/."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml")
    content = r'<p>a <span class="arithmatex">\(\sigma &lt; 1\)</span> b</p><div class="arithmatex">\[x^2\]</div>'
    made = hook("mathml").on_page_content(content)
    assert made.count("<math") == 2
    assert 'display="inline"' in made
    assert 'display="block"' in made
    assert "arithmatex" not in made
    assert made.startswith("<p>a <math")
    with pytest.raises(ValueError, match="expected"):
        hook("mathml").on_page_content('<span class="arithmatex">x</span>')


def test_links_out_of_the_pages_are_named():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="reference/kernels.md"))
    config = {"docs_dir": str(ROOT / "docs")}
    given = "[card](../../cmfast/assets/digits/README.md), [page](../kernels.md), [none](../../no-such-file)"
    named = hook("outside_links").on_page_markdown(given, page=page, config=config, files=None)
    assert named == "`cmfast/assets/digits/README.md`, [page](../kernels.md), [none](../../no-such-file)"
