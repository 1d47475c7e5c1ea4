"""The package mapping of kernels/ to cmfast.kernels; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cmfast", "cmfast.*"]),
        "cmfast.kernels",
        *(f"cmfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"cmfast.kernels": "kernels"},
    package_data={"cmfast": ["py.typed", "assets/*", "assets/*/*"]},
)
