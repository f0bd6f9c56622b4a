"""Plain guidance and S-CFG from the same noise, with the bundled model.

python examples/quickstart.py --prompt "a panda on a beach" --out panda
"""

import argparse

import torch
from PIL import Image

import scfg_fast
from scfg_fast.models import bundled_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a red apple left of a blue car")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="quickstart", help="pictures are OUT-cfg.png and OUT-scfg.png")


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    pipe = bundled_pipeline()  # any diffusers pipeline that scfg_fast.supports

    def draw() -> Image.Image:
        generator = torch.Generator().manual_seed(args.seed)
        return pipe(args.prompt, guidance_scale=5.0, num_inference_steps=args.steps, generator=generator).images[0]

    draw().save(f"{args.out}-cfg.png")
    handle = scfg_fast.enable(pipe)  # this line is all
    draw().save(f"{args.out}-scfg.png")
    print(f"S-CFG guided {handle.stats.steps_applied} steps")


if __name__ == "__main__":
    main()
