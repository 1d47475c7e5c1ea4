"""The recipe of `fashion`: images of clothes."""

from ..unet import UNetConfig
from .data import load_fashion
from .methods.diffusion import DiffusionSettings
from .methods.distillation import DistillationSettings
from .recipe import Recipe, Stage
from .settings import LoopSettings

FASHION = Recipe(
    name="fashion",
    title="Fashion-MNIST, clothes of ten classes, 28×28 pixels, grey, class-conditional",
    licence="MIT",
    data=load_fashion,
    folder="Fashion-MNIST's four IDX files (https://github.com/zalandoresearch/fashion-mnist)",
    unet=UNetConfig(
        image_size=28,
        in_channels=1,
        out_channels=1,
        model_channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_head_channels=32,
        num_classes=10,
        use_scale_shift_norm=True,
        conv_resample=False,
    ),
    teacher=Stage(
        "diffusion",
        DiffusionSettings(log_sigma_mean=-1.0, log_sigma_std=1.4, uniform_share=0.05),
        LoopSettings(
            iterations=9000,
            autocast="bfloat16",
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=100,
            gradient_clip=1.0,
            ema_decays=(0.999,),
        ),
    ),
    student=Stage(
        "distillation",
        DistillationSettings(
            grid_steps=14,
            levels="continuous",
            target_ema_decay=0.9,
            huber_c=0.03,
            features="features-classifier.safetensors",
            feature_weight=50.0,
        ),
        LoopSettings(
            iterations=8000,
            autocast="bfloat16",
            batch_size=64,
            learning_rate=5e-4,
            schedule="linear-tail",
            gradient_clip=100.0,
            ema_decays=(0.999,),
        ),
    ),
    classifier_iterations=2400,
    notes="Shapes are the teacher's; prints and knitwear are grainy, in the student's more than in the teacher's.",
    recommended_levels={1: (80.0,), 2: (80.0, 2.4), 3: (80.0, 2.4, 0.86), 4: (80.0, 8.0, 2.4, 0.86)},
    measured_samples=2000,
)
