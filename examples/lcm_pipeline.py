"""Images by a latent consistency model of diffusers in a few steps, plain and accelerated, and the time of each.

    pip install . diffusers transformers peft
    python examples/lcm_pipeline.py "a lighthouse at dawn" --model SimianLuo/LCM_Dreamshaper_v7 --dtype bfloat16
    python examples/lcm_pipeline.py "a lighthouse at dawn" --model folder --lora folder-of-a-lora --lora-scale 0.5

Any model that diffusers loads as a pipeline with a unet and a vae will do, by its name or as a folder.
"""

import argparse
import time

import numpy as np
import torch
from diffusers import DiffusionPipeline

import cmfast


def main() -> None:
    """Read the command line, make the images, and write the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="SimianLuo/LCM_Dreamshaper_v7", help="a name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--lora", help="a folder or file with a LoRA, loaded after the pipeline was accelerated")
    parser.add_argument("--lora-scale", type=float, default=1.0)
    parser.add_argument("--out", default="lcm.png")
    arguments = parser.parse_args()

    pipe = DiffusionPipeline.from_pretrained(arguments.model)

    def image() -> np.ndarray:
        """[H, W, C] in [0, 1]."""
        generator = torch.Generator().manual_seed(arguments.seed)
        given = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
        return pipe(arguments.prompt, generator=generator, output_type="np", **given).images[0]

    image()  # the first call of each is not timed
    plain, seconds = timed(image)
    print(f"diffusers: {seconds:.2f} s")
    cmfast.accelerate(pipe, getattr(torch, arguments.dtype))
    image()
    fast, seconds = timed(image)
    print(f"cmfast: {seconds:.2f} s; pixels differ by {255 * np.abs(fast - plain).max():.2f} of 255 at most")
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora, adapter_name="lora")
        pipe.set_adapters("lora", arguments.lora_scale)
        fast = image()  # computed with the LoRA: nothing else has to be done
    pipe.numpy_to_pil(fast[None])[0].save(arguments.out)
    print(f"wrote {arguments.out}")


def timed(function):
    """A function's value, and the seconds that it took."""
    begin = time.perf_counter()
    value = function()
    return value, time.perf_counter() - begin


if __name__ == "__main__":
    main()
