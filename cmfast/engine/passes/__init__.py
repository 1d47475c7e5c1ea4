"""What makes the graph of a network faster, one file a pass, in the order in which they run.

A pass is a function of a graph that rewrites it and returns how many times it did. The graph computes the same before
and after each, so that any of them can be left out. `patterns` come first: they put cmfast's operators for torch's.
"""

from collections.abc import Callable

from ..graph import Graph
from ..patterns import attention_products, channel_norm, group_norm, identities, silu, timestep_embedding
from . import (
    activations,
    concatenation,
    constants,
    convolutions,
    gates,
    group_norms,
    linears,
    outputs,
    padding,
    resampling,
    residuals,
    scaling,
    tokens,
    transposed,
    views,
    written_norms,
)

#: name: pass, in order.
PASSES: dict[str, Callable[[Graph], int]] = {
    "identity pattern": identities.recognise,
    "views": views.join,
    "silu pattern": silu.recognise,
    "attention_products pattern": attention_products.recognise,
    "constants": constants.fold,
    "group_norm pattern": group_norm.recognise,
    "channel_norm pattern": channel_norm.recognise,
    "timestep_embedding pattern": timestep_embedding.recognise,
    "transposed": transposed.rewrite,
    "convolutions": convolutions.prepare,
    "scaling": scaling.fold,
    "linears": linears.merge,
    "tokens": tokens.unfold,
    "padding": padding.fuse,
    "resampling": resampling.fuse,
    "concatenation": concatenation.read_pairs,
    "residuals": residuals.fuse,
    "outputs": outputs.fuse,
    "activations": activations.fuse,
    "gates": gates.fuse,
    "group_norms": group_norms.fuse,
}

#: Passes for GPUs, which run after those.
GPU_PASSES: dict[str, Callable[[Graph], int]] = {"written_norms": written_norms.write}
