"""Compiles the extensions: cmfast._cpu with g++ and cmfast._cuda with nvcc (setup.py).

For the tests, the emulation of the CUDA kernels on the CPU, and builds of the CPU kernels that find or make faults.

Objects are kept by the hash of everything that they are made from, so what did not change is not compiled again.
"""

import concurrent.futures
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent

#: Machine code for these, and PTX for what is newer: without clusters, and with them.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80", "compute_90")

_WARNINGS = ("-Wall", "-Wextra")

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def warnings_are_errors() -> bool:
    """Whether CMFAST_WERROR=1: so in development, but compilers that are newer than cmfast warn of other things."""
    return os.environ.get("CMFAST_WERROR") == "1"


def _warnings() -> tuple[str, ...]:
    return (*_WARNINGS, "-Werror") if warnings_are_errors() else _WARNINGS


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
        if found is None:
            raise FileNotFoundError(f"CUDA_HOME is {home!r}, and there is no bin/nvcc in it")
        return found
    return shutil.which("nvcc")


def find_host_compiler() -> list[str] | None:
    """The command that CXX holds, a compiler and options, or g++; None where there is no g++.

    FileNotFoundError where CXX names a compiler that is not there.
    """
    command = shlex.split(os.environ.get("CXX") or "g++")
    program = shutil.which(command[0])
    if program is None:
        if os.environ.get("CXX"):
            raise FileNotFoundError(f"CXX is {os.environ['CXX']!r}, and there is no {command[0]}")
        return None
    return [program, *command[1:]]


def build_cuda(target: Path, objects: Path, nvcc: str) -> None:
    """Compile cmfast._cuda to the file `target`; both compilers warn, also of spilled registers."""
    architectures = cuda_architectures()
    targets = [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in architectures]
    options = ["-std=c++17", "-O3", "-lineinfo", *targets]
    options += ["-Xfatbin=-compress-all"]  # with line numbers, the code would be five times as large
    options += ["-Xptxas=-warn-spills"]
    options += ["-Werror=all-warnings", "-Xptxas=-Werror"] if warnings_are_errors() else []
    options += ["-Xcompiler=" + ",".join((*_warnings(), "-fPIC", "-fvisibility=hidden"))]
    if os.environ.get("CXX") and (compiler := find_host_compiler()):
        options += ["-ccbin", compiler[0], *(f"-Xcompiler={option}" for option in compiler[1:])]
    jobs = [([nvcc, *options, "-c"], source) for source in sorted(SOURCES.glob("cuda/*.cu"))]
    description = f"nvcc {_version(nvcc, 'V')} and {_host_version()}"
    names = tuple(arch if arch.startswith("sm_") else f"PTX {arch}" for arch in architectures)
    host = [*_module("_cuda"), *_build_info(description, names)]
    jobs += [([nvcc, "-std=c++17", "-O2", options[-1], *host, "-c"], SOURCES / "cuda_bindings.cpp")]
    _link([nvcc, "-shared", "-cudart=static"], _compile(jobs, objects, description), target)


def cuda_architectures() -> tuple[str, ...]:
    """What cmfast._cuda is compiled for: ARCHITECTURES, or those that CMFAST_CUDA_ARCHITECTURES names.

    It holds names separated by commas, sm_90 for machine code or compute_90 for PTX, or is "native": the GPUs that
    nvidia-smi finds. ValueError for anything else, or where it finds none.
    """
    given = os.environ.get("CMFAST_CUDA_ARCHITECTURES", "")
    if not given:
        return ARCHITECTURES
    if given == "native":
        return tuple(sorted({f"sm_{capability.replace('.', '')}" for capability in _capabilities()}))
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    wrong = [name for name in names if not re.fullmatch(r"(sm|compute)_\d+[af]?", name)]
    if wrong:
        raise ValueError(f"CMFAST_CUDA_ARCHITECTURES is {given!r}: {wrong[0]!r} is no sm_90, compute_90 or native")
    return names


def _capabilities() -> list[str]:
    """The compute capability of each GPU, "9.0" say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"CMFAST_CUDA_ARCHITECTURES is 'native', and nvidia-smi finds no GPU: {error}") from error
    if not found:
        raise ValueError("CMFAST_CUDA_ARCHITECTURES is 'native', and nvidia-smi finds no GPU")
    return found


def build_cpu(target: Path, objects: Path, compiler: Sequence[str], *, check: str | None = None) -> None:
    """Compile the CPU kernels to the module `target`, each file of csrc/cpu/kernels once for every instruction set.

    `check` builds them for tests, with plain C++ in place of the processor's tiles: as "twin" with seeded faults, none
    of which is set at first, or with the sanitizers "address,undefined" or "thread".
    """
    options = [*compiler, "-std=c++17", *_warnings(), "-fPIC", "-fvisibility=hidden"]
    options += ["-DCMFAST_TILE_TWIN"] if check else []
    isas = cpu_isas(twin=check is not None)
    sanitizers = _sanitizers(check) if check in ("address,undefined", "thread") else []
    options += [*sanitizers, *_CPU_OPTIONS[check]]
    kernels = [*options, *_VECTORS, "-c"]
    host = [([*options, "-c"], source) for source in sorted(SOURCES.glob("cpu/*.cpp"))]
    module = [*options, *_module(target.name.split(".")[0]), f'-DCMFAST_COMPILER="{_host_version()}"', "-c"]
    jobs = [(module, SOURCES / "cpu_bindings.cpp"), *host]
    # The linker keeps the first of the functions that several objects define: those compiled for any processor.
    for isa, flags in isas.items():
        command = [*kernels, *flags, f"-DCMFAST_ISA={isa}"]
        jobs += [(command, source) for source in cpu_sources(isa)]
    # The threads are those of the libgomp that torch has loaded: nothing is linked for them.
    _link([*compiler, "-shared", *sanitizers], _compile(jobs, objects, _host_version()), target)


def cpu_isas(*, twin: bool = False) -> dict[str, list[str]]:
    """The instruction sets that this machine's kind of processor may have, and the compiler's flags for them.

    With a `twin`, amx is compiled for any processor: its tiles are then plain C++ (csrc/cpu/tiles.h).
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": []}
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq"))]
    # Warned of by mistake: the undefined operands of g++'s own AVX-512 intrinsics.
    avx512 += ["-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    bf16 = [*avx512, "-mavx512bf16"]
    tiles = ["-DCMFAST_TILES=2"] if twin else [*bf16, "-DCMFAST_TILES=1"]
    return {"portable": [], "avx2": avx2, "avx512": avx512, "avx512bf16": bf16, "amx": tiles}


def cpu_sources(isa: str) -> list[Path]:
    """The kernels that are compiled for an instruction set: where only products differ from avx512's, those."""
    products, by_tiles = {"attention", "conv", "pack", "pointwise"}, {"attention_by_tiles", "conv_by_tiles"}
    files = sorted(SOURCES.glob("cpu/kernels/*.cpp"))
    if isa not in ("avx512bf16", "amx"):
        return [path for path in files if path.stem not in by_tiles]
    wanted = products | (by_tiles if isa == "amx" else set())
    return [path for path in files if path.stem in wanted]


_VECTORS = ["-fno-exceptions", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# CHECKED: scratch memory of just the size, without a past. OWN_THREADS: such as the thread sanitizer can follow.
_CPU_OPTIONS: dict[str | None, list[str]] = {
    None: ["-O3"],
    "twin": ["-O1", "-DCMFAST_CHECKED", "-DCMFAST_FAULTS"],
    "address,undefined": ["-DCMFAST_CHECKED"],
    "thread": ["-DCMFAST_CHECKED", "-DCMFAST_FAULTS", "-DCMFAST_OWN_THREADS"],
}


def build_emulation(
    target: Path,
    objects: Path,
    *,
    sanitize: bool = False,
    module: str = "_emulated",
    bindings: Path = SOURCES / "cuda_bindings.cpp",
    kernels: Sequence[Path] | None = None,
    options: Sequence[str] = (),
) -> None:
    """Compile the module _emulated, which has the functions of _cuda and runs the kernels on the CPU.

    `sanitize` builds it with the address and the undefined-behaviour sanitizer. A module of other bindings and kernels
    can be built as well, with more options.
    """
    compiler = find_host_compiler()
    if compiler is None:
        raise FileNotFoundError("no host compiler was found: install g++, or name one in CXX")
    command = [*compiler, "-std=c++17", *_warnings(), "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
    # A thread's stack is small, and ends in a page without access that no frame may leap over.
    checks = _sanitizers("address,undefined") if sanitize else []
    command += ["-fstack-clash-protection", "-DCMFAST_EMULATE", *(checks or ["-O2"]), *options]
    sources = sorted(SOURCES.glob("cuda/*.cu")) if kernels is None else kernels
    jobs = [([*command, "-x", "c++", "-c"], source) for source in sources]
    jobs += [([*command, "-c"], source) for source in sorted(SOURCES.glob("emulation/*.cpp"))]
    host = [*command, *_module(module), *_build_info(_host_version(), ("emulated",)), "-x", "c++", "-c"]
    linker = [*compiler, "-shared", *checks]
    _link(linker, _compile([*jobs, (host, bindings)], objects, _host_version()), target)


def _sanitizers(names: str) -> list[str]:
    return ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={names}", "-fno-sanitize-recover=all"]


def _module(name: str) -> list[str]:
    import pybind11

    return [f"-DCMFAST_MODULE={name}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _build_info(compiler: str, architectures: tuple[str, ...]) -> list[str]:
    quoted = {"CMFAST_COMPILER": compiler, "CMFAST_ARCHITECTURES": ", ".join(architectures)}
    return [f'-D{name}="{value}"' for name, value in quoted.items()]


def _version(program: str, marker: str) -> str:
    lines = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.split()
    return next((word[1:] for word in lines if word.startswith(marker) and word[1:2].isdigit()), "of unknown version")


def _host_version() -> str:
    compiler = find_host_compiler()
    if compiler is None:
        return "no host compiler"
    first = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return " ".join((Path(compiler[0]).name, first.split()[-1]))


def _compile(jobs: list[tuple[list[str], Path]], objects: Path, compiler: str) -> list[Path]:
    """Run each command with its source, as many at a time as there are processors; the objects."""
    objects.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [*pool.map(lambda job: _object(*job, objects, compiler), jobs)]
    for old in {*objects.glob("*-????????????????.o")} - {*made}:
        old.unlink()
    return made


def _object(command: list[str], source: Path, objects: Path, compiler: str) -> Path:
    read = b"".join(path.read_bytes() for path in [source, *_headers(source)])
    digest = hashlib.sha256(repr(command).encode() + compiler.encode() + read).hexdigest()[:16]
    target = objects / f"{source.stem}-{digest}.o"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}.o")
        _run([*command, str(source), "-o", str(fresh)])
        fresh.replace(target)
    return target


def _headers(source: Path) -> list[Path]:
    """The files that a source includes by quoted names, and that those include, wherever an include stands.

    Such names are relative to the file that includes them. The compiler's own headers change with its version.
    """
    found: dict[Path, None] = {}
    unread = [source]
    while unread:
        file = unread.pop()
        for name in _INCLUDE.findall(file.read_text()):
            header = (file.parent / name).resolve()
            if header not in found:
                found[header] = None
                unread.append(header)
    return sorted(found)


def _link(command: list[str], objects: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")  # a module that is loaded is not written over
    _run([*command, *map(str, objects), "-o", str(fresh)])
    fresh.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
