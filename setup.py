"""The package mapping of kernels/ to cmfast.kernels and the CUDA extension; everything else is in pyproject.toml.

cmfast._cuda is built where nvcc is found, unless CMFAST_BUILD_CUDA=0; cmfast installs and runs without it.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

nvcc = None if os.environ.get("CMFAST_BUILD_CUDA") == "0" else toolchain.find_nvcc()


class BuildExtensions(build_ext):
    def build_extension(self, ext):
        toolchain.build_cuda(Path(self.get_ext_fullpath(ext.name)), ROOT / "build" / "cuda", nvcc)


setup(
    packages=[
        *find_packages(include=["cmfast", "cmfast.*"]),
        "cmfast.kernels",
        *(f"cmfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"cmfast.kernels": "kernels"},
    package_data={"cmfast": ["py.typed", "assets/*", "assets/*/*"]},
    ext_modules=[Extension("cmfast._cuda", sources=["csrc/cuda_bindings.cpp"])] if nvcc else [],
    cmdclass={"build_ext": BuildExtensions},
)
