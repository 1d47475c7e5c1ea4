"""Precision and recall of samples: how many look real, and how much of what is real they cover.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", equations 1 and 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: What the paper takes for k.
NEIGHBOURS = 3

#: Rows of features whose distances to all others are in memory at once.
_ROWS = 1024


class PrecisionRecall(NamedTuple):
    """Which samples lie within the real manifold [N], and which real images within the samples' [M]: booleans.

    Their means are precision and recall.
    """

    precise: Tensor
    recalled: Tensor


def precision_recall(real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Find which of the features lie within the other set's manifold.

    A set's manifold is the union of spheres about its members, each as large as the distance to the member's k-th
    nearest other member.

    Args:
        real: features of real images [M, D].
        samples: features of samples [N, D].
        neighbours: k.

    Raises:
        ValueError: a set of k members or fewer, or features of other sizes.
    """
    if real.ndim != 2 or samples.ndim != 2 or real.shape[1] != samples.shape[1]:
        raise ValueError(f"precision_recall: expected [M, D] and [N, D], got {list(real.shape)}, {list(samples.shape)}")
    if neighbours < 1 or min(len(real), len(samples)) <= neighbours:
        raise ValueError(
            f"precision_recall: {neighbours} neighbours need more members than that, got {len(real)} and {len(samples)}"
        )
    return PrecisionRecall(_within(samples, real, neighbours), _within(real, samples, neighbours))


def _within(points: Tensor, members: Tensor, neighbours: int) -> Tensor:
    """Whether each point [N, D] lies in the sphere of any member [M, D]."""
    own = torch.cat([_distances(rows, members).kthvalue(neighbours + 1).values for rows in members.split(_ROWS)])
    return torch.cat([(_distances(rows, members) <= own).any(1) for rows in points.split(_ROWS)])


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # Not by products: those lose the distances of near neighbours, which are what counts here.
    return torch.cdist(rows.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
