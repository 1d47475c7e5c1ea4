"""Training: EDM diffusion, and consistency distillation from such a model."""

from .diffusion import DiffusionTraining, train_diffusion
from .distillation import DistillationTraining, distill
from .recipes import RECIPES

__all__ = ["RECIPES", "DiffusionTraining", "DistillationTraining", "distill", "train_diffusion"]
