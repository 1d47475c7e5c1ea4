"""The recipe of `moving-digits`: video."""

from ..unet import UNetConfig
from .data.moving_digits import load_moving_digits
from .methods.diffusion import DiffusionSettings
from .methods.distillation import DistillationSettings
from .recipe import Recipe, Stage
from .settings import LoopSettings

MOVING_DIGITS = Recipe(
    name="moving-digits",
    title="scikit-learn's digits in motion, clips of 8 frames of 16×16 pixels, grey, class-conditional",
    licence="CC BY 4.0 (the digits: Alpaydin and Kaynak 1998, UCI Machine Learning Repository)",
    data=load_moving_digits,
    unet=UNetConfig(
        dims=3,
        image_size=(8, 16, 16),
        in_channels=1,
        out_channels=1,
        patch_size=2,
        model_channels=32,
        channel_mult=(1, 1, 1),
        num_res_blocks=1,
        attention_resolutions=(1, 2, 4),
        num_head_channels=32,
        num_classes=10,
        use_scale_shift_norm=True,
        conv_resample=False,
    ),
    teacher=Stage(
        "diffusion",
        DiffusionSettings(log_sigma_mean=0.2, log_sigma_std=1.5),
        LoopSettings(
            iterations=6000,
            batch_size=32,
            warmup=50,
            learning_rate=1e-3,
            schedule="cosine",
            gradient_clip=1.0,
            ema_decays=(0.998,),
            autocast="bfloat16",
        ),
    ),
    student=Stage(
        "distillation",
        DistillationSettings(
            grid_steps=12,
            levels="continuous",
            target_ema_decay=0.9,
            huber_c=0.03,
            features="features-classifier.safetensors",
            feature_weight=50.0,
        ),
        LoopSettings(
            iterations=4000,
            batch_size=32,
            learning_rate=5e-4,
            schedule="linear-tail",
            gradient_clip=100.0,
            ema_decays=(0.998,),
            autocast="bfloat16",
        ),
    ),
    classifier_iterations=2400,
    recommended_levels={1: (80.0,), 2: (80.0, 2.0), 4: (80.0, 5.0, 2.0, 0.6)},
    measured_samples=300,
    notes="""\
In one step the digit can be told in nearly every clip, but many frames have ghosts of other places and shapes. In four
steps there is one digit a frame, on a ground with grain, and its shape wavers more than the teacher's.
""",
    teacher_steps=(5, 10, 18),
)
