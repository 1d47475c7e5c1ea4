"""Where the time of a model's call goes, by operator and by layer: on any device, accelerated or not."""

from typing import TYPE_CHECKING, Any

from torch import nn

from . import pipelines

if TYPE_CHECKING:
    from .profiling import Profile


def profile(model: Any, *args: Any, **kwargs: Any) -> "Profile":
    """Call a model several times, and return where the time goes: `print` it for a report.

    What `cmfast.accelerate` returned is profiled as the engine runs it, anything else as torch does; `cmfast profile`
    prints the same. Each row of the result is an operator that ran: its layer, seconds, operations, bytes, and the
    least time for these on this machine, whose rates are measured too. Operators that torch runs are recorded one by
    one, which takes a few microseconds each; the call as a whole is timed without that.

    Args:
        model: any network, a ConsistencyModel, or a diffusers pipeline; accelerated or not.
        args: of its call: it does what this call does, without gradients.
        kwargs: the same by name.

    Returns:
        A `profiling.Profile`: `rows`, `by_operator()`, `by_layer(depth)`, `memory()`, `to_json()`, `save_trace(path)`
        for Perfetto, `plot(path)` for a roofline.

    Raises:
        TypeError: something else.
        Exception: what the call itself raises.
    """
    networks = {"": model} if isinstance(model, nn.Module) else pipelines.networks(model)
    if not networks:
        raise TypeError(
            "profile: expected a torch network, a ConsistencyModel, or a diffusers pipeline with a unet, a transformer "
            f"or a vae, got {type(model).__name__}"
        )
    from .profiling import profile_call

    return profile_call(lambda: model(*args, **kwargs), networks, type(model).__name__)
