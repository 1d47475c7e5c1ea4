"""The dry run's stage before the others: csrc/emulation, which takes the CUDA kernels' launches, is compiled."""

from . import stage


def cases(device, folder, until):
    """The build, which `device.chosen` has made by now."""
    yield stage.Case("build", lambda: [{"missing": device.missing}])


if __name__ == "__main__":
    stage.main("emulation", cases)
