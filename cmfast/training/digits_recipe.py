"""The recipe of `digits`: small images."""

from ..unet import UNetConfig
from .data import load_digits
from .methods.diffusion import DiffusionSettings
from .methods.distillation import DistillationSettings
from .recipe import Recipe, Stage
from .settings import LoopSettings

DIGITS = Recipe(
    name="digits",
    title="scikit-learn's handwritten digits, 8×8 pixels, grey, class-conditional",
    licence="CC BY 4.0",
    data=load_digits,
    unet=UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        num_classes=10,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    teacher=Stage(
        "diffusion",
        DiffusionSettings(),
        LoopSettings(iterations=2000, learning_rate=1e-3, schedule="cosine", ema_decays=(0.999,)),
    ),
    student=Stage(
        "distillation",
        DistillationSettings(grid_steps=18, target_ema_decay=0.9, huber_c=0.03),
        LoopSettings(
            iterations=600,
            learning_rate=5e-4,
            schedule="linear-tail",
            gradient_clip=10.0,
            ema_decays=(0.997,),
            ema_warmup=False,  # some of the teacher, where they start, stays in them
        ),
    ),
    classifier_iterations=800,
    recommended_levels={1: (80.0,), 2: (80.0, 0.5), 4: (80.0, 2.0, 0.8, 0.3)},
)
