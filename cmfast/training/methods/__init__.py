"""The ways of training, by name: each has its settings and its file."""

from .consistency_training import ConsistencyTraining, ConsistencyTrainingSettings
from .continuous_consistency import ContinuousConsistencySettings
from .continuous_consistency_distillation import ContinuousConsistencyDistillation
from .continuous_consistency_training import ContinuousConsistencyTraining
from .diffusion import Diffusion, DiffusionSettings
from .distillation import Distillation, DistillationSettings
from .easy_consistency_tuning import EasyConsistencyTuning, EasyConsistencyTuningSettings
from .improved_consistency_training import ImprovedConsistencyTraining, ImprovedConsistencyTrainingSettings
from .method import Draws, Method
from .progressive_distillation import ProgressiveDistillation, ProgressiveDistillationSettings

#: name: (settings, method). A method is made of a model, its settings, the number of updates and a teacher or None.
METHODS: dict[str, tuple[type, type[Method]]] = {
    "diffusion": (DiffusionSettings, Diffusion),
    "distillation": (DistillationSettings, Distillation),
    "consistency-training": (ConsistencyTrainingSettings, ConsistencyTraining),
    "improved-consistency-training": (ImprovedConsistencyTrainingSettings, ImprovedConsistencyTraining),
    "easy-consistency-tuning": (EasyConsistencyTuningSettings, EasyConsistencyTuning),
    "continuous-consistency-training": (ContinuousConsistencySettings, ContinuousConsistencyTraining),
    "continuous-consistency-distillation": (ContinuousConsistencySettings, ContinuousConsistencyDistillation),
    "progressive-distillation": (ProgressiveDistillationSettings, ProgressiveDistillation),
}

__all__ = ["METHODS", "Draws", "Method"]
