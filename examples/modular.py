"""S-CFG as the guider of a modular pipeline.

python examples/modular.py --prompt "an owl on a wooden fence" --device cuda --dtype float16
"""

import argparse

import torch
from diffusers import ModularPipeline

from scfg_fast.guider import SCFGGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="an SDXL folder or hub id")
parser.add_argument("--prompt", default="an owl on a wooden fence, blue mountains behind")
parser.add_argument("--guidance-scale", type=float, default=5.0)
parser.add_argument("--size", type=int, default=1024)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
parser.add_argument("--out", default="modular.png")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    pipe = ModularPipeline.from_pretrained(args.model)
    pipe.load_components(torch_dtype=getattr(torch, args.dtype))
    pipe.to(args.device)
    guider = SCFGGuidance(args.guidance_scale, scfg={"rate_max": 1.5})
    pipe.update_components(guider=guider)
    images = pipe(
        prompt=args.prompt,
        num_inference_steps=args.steps,
        height=args.size,
        width=args.size,
        generator=torch.Generator().manual_seed(args.seed),
        output="images",
    )
    images[0].save(args.out)
    print(f"S-CFG guided {guider.stats.steps_applied} steps")


if __name__ == "__main__":
    main()
