"""Quality measures of samples, with confidence intervals, and the levels that make them best."""

from .bootstrap import Interval, interval
from .classifier import Classifier, load_classifier
from .features import Features, load_features
from .levels import Swept, sweep
from .measures import Measure, report
from .precision_recall import PrecisionRecall, precision_recall
from .quality import Quality, evaluate, frechet_distance, nearest_distance

__all__ = [
    "Classifier",
    "Features",
    "Interval",
    "Measure",
    "PrecisionRecall",
    "Quality",
    "Swept",
    "evaluate",
    "frechet_distance",
    "interval",
    "load_classifier",
    "load_features",
    "nearest_distance",
    "precision_recall",
    "report",
    "sweep",
]
