"""The networks of a diffusers pipeline, which the engine evaluates in their places.

A pipeline is known by its parts, not by its type: diffusers is not imported.
"""

from typing import Any

from torch import nn

#: Where a pipeline's time goes: the network that is evaluated at each step, and what maps images to latents and back.
_NETWORKS = ("unet", "transformer", "vae.encoder", "vae.decoder")


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by their names; without any, it is none.

    Of an autoencoder, these are the encoder and the decoder that its `encode` and `decode` call.
    """
    found = {}
    for name in _NETWORKS:
        value = pipeline
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, nn.Module):
            found[name] = value
    return found
