"""A model with the same weights under another preconditioning: what a student starts from."""

import copy
import dataclasses

from ...model import ConsistencyModel
from ...preconditioning import EDM, Consistency, Preconditioning, TrigFlow
from .checks import preconditioning_of


def copied(model: ConsistencyModel, preconditioning: Preconditioning) -> ConsistencyModel:
    """A copy of the model's network, whose parameters have gradients, with that preconditioning."""
    found = viewed(model, preconditioning)
    found.unet = copy.deepcopy(model.unet).requires_grad_(True)
    return found


def viewed(model: ConsistencyModel, preconditioning: Preconditioning) -> ConsistencyModel:
    """A model of the very same network with that preconditioning."""
    return ConsistencyModel(
        model.unet,
        preconditioning,
        sample_shape=model.sample_shape,
        num_classes=model.num_classes,
        representation=model.representation,
    )


def consistency_from(model: ConsistencyModel) -> ConsistencyModel:
    """A consistency model with the weights of an EDM model, or of another consistency model.

    The two denoisers differ by sigma_min / sigma at most, which is what the boundary condition takes. Song et al. 2023,
    "Consistency Models", appendix C.

    Raises:
        ValueError: another preconditioning.
    """
    return copied(model, Consistency(**_edm_fields(preconditioning_of("consistency_from", model, EDM, Consistency))))


def trigflow_from(model: ConsistencyModel) -> ConsistencyModel:
    """A TrigFlow model with the weights of an EDM model: the same function, in TrigFlow's variables.

    With t = atan(sigma / sigma_data), a sample x of TrigFlow is cos(t) times the sample of EDM at the level sigma. The
    networks' inputs are the same x / sigma_data, and the denoisers agree:

        D_trigflow(x, sigma) = D_edm(x / cos t, sigma)

    EDM's network then estimates the negative of what TrigFlow's does, and its time stays 250 · ln sigma; so the weights
    are kept and the preconditioning is `TrigFlow(network="edm")`. A TrigFlow model is copied as it is. Lu and Song
    2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", section 3.

    Raises:
        ValueError: another preconditioning.
    """
    return copied(model, trigflow_of(preconditioning_of("trigflow_from", model, EDM, TrigFlow)))


def trigflow_of(p: EDM | TrigFlow) -> TrigFlow:
    """The TrigFlow preconditioning of a network that was trained with p; see `trigflow_from`."""
    return p if isinstance(p, TrigFlow) else TrigFlow(**_edm_fields(p), network="edm")


def _edm_fields(p: EDM) -> dict:
    return {field.name: getattr(p, field.name) for field in dataclasses.fields(EDM)}
