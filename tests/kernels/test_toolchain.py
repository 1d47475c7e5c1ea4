"""How the extensions are compiled: what is found, what is kept, and what an error says."""

import pytest

from . import emulation

pytestmark = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())


@pytest.fixture
def toolchain():
    return emulation.toolchain()


def test_nvcc_is_that_of_cuda_home_or_on_path(toolchain, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"CUDA_HOME is .* no bin/nvcc in it"):
        toolchain.find_nvcc()
    program.touch(0o755)
    assert toolchain.find_nvcc() == str(program)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(program.parent))
    assert toolchain.find_nvcc() == str(program)


def test_cxx_is_a_command(toolchain, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    (program,) = toolchain.find_host_compiler()
    monkeypatch.setenv("CXX", f"{program} -m64 -DANSWER=42")
    assert toolchain.find_host_compiler() == [program, "-m64", "-DANSWER=42"]
    source = tmp_path / "answer.cpp"
    source.write_text("static_assert(ANSWER == 42);")
    assert toolchain._compile([([*toolchain.find_host_compiler(), "-c"], source)], tmp_path / "objects", "")
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(FileNotFoundError, match="CXX is 'no-such-compiler -m64', and there is no no-such-compiler"):
        toolchain.find_host_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_host_compiler() is None


def test_a_warning_is_an_error_where_that_is_asked_for(toolchain, tmp_path, monkeypatch):
    source = tmp_path / "unused.cpp"
    source.write_text("void f() { int unused; }")

    def compiled(objects):
        return toolchain._compile(
            [([*toolchain.find_host_compiler(), *toolchain._warnings(), "-c"], source)], objects, ""
        )

    monkeypatch.delenv("CMFAST_WERROR", raising=False)
    assert compiled(tmp_path / "lenient")
    monkeypatch.setenv("CMFAST_WERROR", "1")
    with pytest.raises(RuntimeError, match="unused"):
        compiled(tmp_path / "strict")


def test_what_did_not_change_is_not_compiled_again(toolchain, tmp_path):
    source, compiler = tmp_path / "answer.cpp", toolchain.find_host_compiler()
    source.write_text("int answer() { return 42; }")
    job = ([*compiler, "-c"], source)
    (first,) = toolchain._compile([job], tmp_path / "objects", "")
    written = first.stat().st_mtime_ns
    assert toolchain._compile([job], tmp_path / "objects", "") == [first]
    assert first.stat().st_mtime_ns == written
    source.write_text("int answer() { return 43; }")
    (second,) = toolchain._compile([job], tmp_path / "objects", "")
    assert second != first
    assert list((tmp_path / "objects").iterdir()) == [second]


def test_an_object_is_made_of_the_headers_that_it_includes(toolchain, tmp_path):
    """Of those that its headers include, too, wherever they stand; of no others."""
    (tmp_path / "inner").mkdir()
    headers = {"answer.h": '#include "inner/number.h"', "inner/number.h": "#define NUMBER 42", "other.h": ""}
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
    source = tmp_path / "answer.cpp"
    source.write_text('#include <cstdint>\n#include "answer.h"\nint64_t answer() { return NUMBER; }')
    job = ([*toolchain.find_host_compiler(), "-c"], source)
    (first,) = toolchain._compile([job], tmp_path / "objects", "")
    (tmp_path / "other.h").write_text("#define OTHER")
    assert toolchain._compile([job], tmp_path / "objects", "") == [first]
    for changed in ("answer.h", "inner/number.h"):
        (tmp_path / changed).write_text(headers[changed] + "\n")
        (second,) = toolchain._compile([job], tmp_path / "objects", "")
        assert second != first
        first = second


def test_every_header_belongs_to_an_object(toolchain):
    """The scan follows the includes of the sources as the compiler does: it reaches all headers of csrc."""
    sources = [path for kind in ("cpp", "cu") for path in toolchain.SOURCES.rglob(f"*.{kind}")]
    reached = {header for source in sources for header in toolchain._headers(source)}
    assert reached == {path for kind in ("h", "cuh") for path in toolchain.SOURCES.rglob(f"*.{kind}")}
    conv = toolchain._headers(toolchain.SOURCES / "cpu" / "kernels" / "conv.cpp")
    assert {"conv.h", "vector.h", "winograd.h"} <= {path.name for path in conv}
    assert not any("cuda" in path.parts for path in conv)


def test_a_source_that_does_not_compile_is_an_error(toolchain, tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int answer() { return unheard_of; }")
    with pytest.raises(RuntimeError, match="unheard_of"):
        toolchain._compile([([*toolchain.find_host_compiler(), "-c"], source)], tmp_path / "objects", "")


def test_architectures(toolchain, monkeypatch):
    monkeypatch.delenv("CMFAST_CUDA_ARCHITECTURES", raising=False)
    assert toolchain.cuda_architectures() == toolchain.ARCHITECTURES
    monkeypatch.setenv("CMFAST_CUDA_ARCHITECTURES", "sm_90, compute_90,sm_90,sm_100a")
    assert toolchain.cuda_architectures() == ("sm_90", "compute_90", "sm_100a")
    monkeypatch.setenv("CMFAST_CUDA_ARCHITECTURES", "sm_90,9.0")
    with pytest.raises(ValueError, match=r"is 'sm_90,9.0': '9.0' is no sm_90, compute_90 or native"):
        toolchain.cuda_architectures()


def test_native_architectures_are_those_of_nvidia_smi(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("CMFAST_CUDA_ARCHITECTURES", "native")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"native.* nvidia-smi finds no GPU"):
        toolchain.cuda_architectures()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    program.chmod(0o755)
    assert toolchain.cuda_architectures() == ("sm_86", "sm_90")
    program.write_text("#!/bin/sh\n")
    with pytest.raises(ValueError, match=r"native.* nvidia-smi finds no GPU"):
        toolchain.cuda_architectures()
