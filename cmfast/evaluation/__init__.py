"""Quality measures: class accuracy and Fréchet distance of a classifier's features, nearest neighbours."""

from .classifier import Classifier, load_classifier
from .quality import Quality, evaluate, frechet_distance, nearest_distance

__all__ = ["Classifier", "Quality", "evaluate", "frechet_distance", "load_classifier", "nearest_distance"]
