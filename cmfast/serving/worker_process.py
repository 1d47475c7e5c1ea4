"""The process that has the model: it evaluates batch after batch until its connection ends."""

import contextlib
import logging
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np

from ..engine.accelerator import accelerator_of
from ..kernels import use_backend
from ..model import ConsistencyModel
from .description import Description
from .evaluation import Evaluator
from .settings import ModelSettings

logger = logging.getLogger("cmfast.serving")


def work(connection: Connection, settings: ModelSettings, sizes: Sequence[int]) -> None:
    """Load the model, warm it up, and evaluate what comes, until None does.

    Sends a Description once it is ready, or a line that says why it cannot be; then, for each (number, batch) that it
    receives, (number, samples of each piece, seconds), or (number, a line that says what went wrong, seconds).
    """
    # Where the service has ended, the connection has.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), contextlib.ExitStack() as kernels:
        try:
            if settings.backend != "auto":
                kernels.enter_context(use_backend(settings.backend))
            model = settings.load()
            evaluate = Evaluator(model, settings.threads)
            evaluate.warm_up(sizes)
        except Exception as error:
            connection.send(_line(error))
            return
        connection.send(_description(model, settings))
        while (message := connection.recv()) is not None:
            number, batch = message
            begin = time.perf_counter()
            found: list[np.ndarray] | str
            try:
                found = evaluate(batch)
            except Exception as error:
                logger.error("a batch of %d samples failed:\n%s", batch.size, traceback.format_exc())
                found = _line(error)
            connection.send((number, found, time.perf_counter() - begin))


def _description(model: ConsistencyModel, settings: ModelSettings) -> Description:
    return Description(
        settings.name,
        model.sample_shape,
        model.num_classes,
        model.preconditioning,
        model.recommended_levels,
        accelerator_of(model.unet) is not None,
        str(model.device),
    )


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
