"""The backends that this machine can test, as a pytest parameter: the case lists are the same for all of them."""

from unittest import mock

import pytest
from cmfast.kernels import backends


def served(op: str) -> list:
    """A parameter a backend; those that cannot serve `op` here are skipped with their reason."""
    with mock.patch.dict("os.environ", {"CMFAST_GPU_ON_CPU": "1"}):  # as the fixture in conftest.py sets it
        answers = {name: backends.available(name, op) for name in backends.BACKENDS}
    return [
        pytest.param(name, marks=[] if ok else pytest.mark.skip(reason=f"{name}: {reason}"))
        for name, (ok, reason) in answers.items()
    ]
