"""What is compared of pictures: the features of a classifier, or of the Inception network that the literature takes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..pictures import to_pixels
from .classifier import Classifier, load_classifier

#: The name of torch-fidelity's Inception network.
INCEPTION = "inception"


class Features(NamedTuple):
    """How pictures are seen.

    Attributes:
        name: for tables.
        of: the features [N, D] of samples [N, C, *spatial] in [-1, 1].
        classifier: which also knows the classes and the real sets' statistics; None where the network has none.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    classifier: Classifier | None = None


def load_features(source: str | Path = "digits") -> Features:
    """A classifier, as `load_classifier` takes it, or "inception".

    The latter is the network of Heusel et al. 2017 in torch-fidelity's form, with features [N, 2048] before its last
    layer, which it downloads at first. Distances by it are those that papers give. It sees images of one or three
    channels; of other samples it raises ValueError.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no classifier.
    """
    if source != INCEPTION:
        classifier = load_classifier(source)
        return Features("classifier", classifier.features, classifier)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("the Inception network comes with torch-fidelity: pip install torch-fidelity") from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()

    def of(images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"inception sees images [N, 1 or 3, H, W], got {list(images.shape)}")
        return network(to_pixels(images).expand(-1, 3, -1, -1))[0]

    return Features(INCEPTION, of)
