"""SDXL with S-CFG, and a second picture that names each region with its token and its rate.

python examples/sdxl_regions.py --prompt "an owl on a wooden fence" --device cuda --dtype float16
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

import scfg_fast
from scfg_fast.regions import overlay, region_table, token_labels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="an SDXL folder or hub id")
parser.add_argument("--prompt", default="an owl on a wooden fence, blue mountains behind")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
parser.add_argument("--out", default="sdxl", help="pictures are OUT.png and OUT-regions.png")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        args.model, torch_dtype=getattr(torch, args.dtype), use_safetensors=True
    ).to(args.device)
    # A rate of at most 1.5 keeps calm backgrounds smooth. "words": the start token and the padding own no region.
    config = scfg_fast.SCFGConfig(rate_max=1.5, tokens="words")
    middle = {}

    def keep(step: int, regions: scfg_fast.Regions) -> None:
        if step == args.steps // 2:
            middle["regions"] = regions.clone()  # the next step overwrites them

    scfg_fast.enable(pipe, config, on_regions=keep)
    generator = torch.Generator().manual_seed(args.seed)
    image = pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0]
    image.save(f"{args.out}.png")

    regions = middle["regions"].cpu()
    labels = token_labels(pipe.tokenizer, args.prompt, pipe.tokenizer.model_max_length)
    overlay(image, regions, 0, labels, size=max(image.size)).save(f"{args.out}-regions.png")
    for row in region_table(regions, labels):
        print(f"{row.label:<12} {100 * row.share:5.1f} % of the picture at {row.rate:.2f} times the guidance scale")


if __name__ == "__main__":
    main()
