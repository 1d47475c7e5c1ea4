import pytest

from cmfast.profiling import ceilings, measurement

_THOROUGH = {"_FEWEST": measurement._FEWEST, "_SECONDS": measurement._SECONDS}


@pytest.fixture(scope="package", autouse=True)
def _quick():
    """One round, and rates by one measurement: what was measured is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_FEWEST", 1)
        patch.setattr(measurement, "_SECONDS", 0.0)
        patch.setattr(ceilings, "_TRIES", 1)
        patch.setattr(ceilings, "_SECONDS", 0.0)
        patch.setattr(ceilings, "_LONG", 0.0)
        yield


@pytest.fixture
def _thorough(monkeypatch):
    """As many rounds as otherwise."""
    for name, value in _THOROUGH.items():
        monkeypatch.setattr(measurement, name, value)
