"""The package mapping of kernels/ to cmfast.kernels and the extensions; everything else is in pyproject.toml.

cmfast._cpu is built where a C++ compiler is found, and cmfast._cuda where nvcc is, unless CMFAST_BUILD_CPU=0 or
CMFAST_BUILD_CUDA=0; cmfast installs and runs without them.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

compiler = None if os.environ.get("CMFAST_BUILD_CPU") == "0" else toolchain.find_host_compiler()
nvcc = None if os.environ.get("CMFAST_BUILD_CUDA") == "0" else toolchain.find_nvcc()
extensions = [Extension("cmfast._cpu", sources=["csrc/cpu_bindings.cpp"])] if compiler else []
extensions += [Extension("cmfast._cuda", sources=["csrc/cuda_bindings.cpp"])] if nvcc else []


class BuildExtensions(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if ext.name == "cmfast._cpu":
            toolchain.build_cpu(target, ROOT / "build" / "cpu", compiler)
        else:
            toolchain.build_cuda(target, ROOT / "build" / "cuda", nvcc)


setup(
    packages=[
        *find_packages(include=["cmfast", "cmfast.*"]),
        "cmfast.kernels",
        *(f"cmfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"cmfast.kernels": "kernels"},
    package_data={"cmfast": ["py.typed", "assets/*", "assets/*/*", "engine/cuda/measured/*", "serving/page.html"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtensions},
)
