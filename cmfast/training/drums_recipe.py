"""The recipe of `drums`: sound."""

from ..preconditioning import EDM
from ..unet import UNetConfig
from .data.drums import REPRESENTATION, load_drums
from .methods.diffusion import DiffusionSettings
from .methods.distillation import DistillationSettings
from .recipe import Recipe, Stage
from .settings import LoopSettings

DRUMS = Recipe(
    name="drums",
    title="synthesised drum hits of 0.512 s at 16 kHz, class-conditional",
    licence="MIT; `cmfast/training/data/drums.py` synthesises the hits from a fixed seed, without recordings",
    data=load_drums,
    unet=UNetConfig(
        dims=1,
        image_size=512,
        in_channels=16,
        out_channels=16,
        model_channels=32,
        channel_mult=(2, 2, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_head_channels=32,
        num_classes=8,
        use_scale_shift_norm=True,
        conv_resample=False,
    ),
    preconditioning=EDM(sigma_data=0.08, sigma_min=0.0003, sigma_max=12.0),
    representation=REPRESENTATION,
    teacher=Stage(
        "diffusion",
        DiffusionSettings(log_sigma_mean=-2.7, log_sigma_std=1.5),
        LoopSettings(
            iterations=4000,
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
            huber_c=0.005,
            features="features-classifier.safetensors",
            feature_weight=25.0,
        ),
        LoopSettings(
            iterations=3000,
            batch_size=32,
            learning_rate=5e-4,
            schedule="linear-tail",
            gradient_clip=100.0,
            ema_decays=(0.998,),
            autocast="bfloat16",
        ),
    ),
    classifier_iterations=800,
    recommended_levels={1: (12.0,), 2: (12.0, 4.0), 4: (12.0, 5.0, 2.2, 1.0)},
    measured_samples=160,
    teacher_steps=(10,),
    notes="""\
A sample [16, 512] is the modified discrete cosine transform of a hit; `model.representation.decode` makes waveforms.
Some snares and claps have an echo, and kicks waver a little where they fade.
""",
)
