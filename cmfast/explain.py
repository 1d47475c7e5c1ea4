"""What the engine does of an accelerated model, and what it leaves to torch and why."""

from typing import TYPE_CHECKING, Any

from .accelerate import accelerated_networks

if TYPE_CHECKING:
    from .engine.explanation import Explanation


def explain(model: Any, *args: Any, **kwargs: Any) -> "Explanation":
    """Call an accelerated model once, and return what the engine did: `print` it for a report.

    The report says which modules were captured, which were not and why, how many steps the kernels serve by operator,
    which operators are left to torch and why, and what each pass did. `cmfast profile --explain` prints the same.

    Args:
        model: what `cmfast.accelerate` returned: a network, a ConsistencyModel, or a diffusers pipeline.
        args: of its call: it does what this call does, such as drawing an image with a pipeline.
        kwargs: the same by name.

    Returns:
        An `engine.explanation.Explanation`: `captured`, `left`, `kernels`, `torch`, `passes` and sizes as attributes.

    Raises:
        ValueError: the model is not an accelerated one.
        Exception: what the call itself raises; CaptureError, where nothing of the network can be captured.
    """
    networks = accelerated_networks(model, "explain")
    from .engine.explanation import explanation
    from .engine.trace import tracing

    with tracing() as trace:
        model(*args, **kwargs)
    return explanation(trace, networks)
