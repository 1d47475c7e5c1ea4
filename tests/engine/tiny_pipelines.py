"""diffusers pipelines of small random parts, and a LoRA for them."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOCABULARY = [*_LETTERS, *(c + "</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"]


def _random(module, seed):
    """Weights large enough that what an input changes shows in the images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(drawn * (1.5 / p[0].numel()) ** 0.5)
            else:
                p.copy_(0.2 * drawn + name.endswith("weight"))
    return module.eval()


def unet(**changes):
    """A UNet that is conditioned on text and on the guidance's scale."""
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "time_cond_proj_dim": 8,
    }
    return _random(diffusers.UNet2DConditionModel(**config | changes), 1)


def vae(tiny=False):
    if tiny:
        config = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4}
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        return _random(diffusers.AutoencoderTiny(**config, **channels), 2)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return _random(
        diffusers.AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **kinds), 3
    )


def tokenizer():
    vocabulary = {token: i for i, token in enumerate(_VOCABULARY)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_encoder(projection=False):
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(_VOCABULARY),
        max_position_embeddings=16,
        bos_token_id=len(_VOCABULARY) - 2,
        eos_token_id=len(_VOCABULARY) - 1,
        pad_token_id=len(_VOCABULARY) - 1,
        projection_dim=16,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return _random(kind(config), 4)


def pipeline(kind="LatentConsistencyModelPipeline", scheduler="LCMScheduler", *, tiny=False, **changes):
    """A pipeline whose parts are the same at every call; `changes` are the UNet's."""
    parts = {"scheduler": getattr(diffusers, scheduler)(), "vae": vae(tiny)}
    parts |= {"tokenizer": tokenizer(), "text_encoder": text_encoder()}
    if "XL" in kind:
        parts |= {"tokenizer_2": tokenizer(), "text_encoder_2": text_encoder(projection=True)}
        changes = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 16,
            "cross_attention_dim": 32,
        } | changes
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if not kind.startswith("LatentConsistency"):
        changes = {"time_cond_proj_dim": None} | changes
    found = getattr(diffusers, kind)(unet=unet(**changes), **parts)
    found.set_progress_bar_config(disable=True)
    return found


def images(pipe, steps=2, seed=3, **arguments):
    """[N, H, W, C] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    if "Img2Img" in type(pipe).__name__:
        arguments = {"image": torch.rand(1, 3, 16, 16, generator=generator), "strength": 0.9} | arguments
    if not {"prompt", "prompt_embeds", "class_labels"} & arguments.keys():
        arguments["prompt"] = "a cat"
    return pipe(generator=generator, num_inference_steps=steps, output_type="np", **arguments).images
