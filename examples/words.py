"""Masks of words from a stock picture, and the picture again with guidance where you want it; with the bundled model.

python examples/words.py "a strawberry above a green bell on a yellow background" strawberry bell --out words.png

The columns: the stock picture, the share of the attention that each word has in it, the same noise with twice the
guidance in the regions of the first word, and with the guidance halved outside of that word's mask.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import scfg_fast
from scfg_fast import SCFGConfig
from scfg_fast.models import bundled_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("words", nargs="+", help="words of the prompt")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--guidance-scale", type=float, default=5.0)
parser.add_argument("--out", default="words.png")


def heat(picture: Image.Image, shares: torch.Tensor) -> Image.Image:
    """The picture in grey, in red where a word's share [h, w] of the attention is high."""
    share = (shares - shares.min()) / (shares.max() - shares.min())
    strength = F.interpolate(share[None, None], picture.size[::-1], mode="bilinear")[0, 0].numpy()
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None].repeat(3, 2)
    red = np.array([220.0, 40.0, 30.0], dtype=np.float32)
    mixed = grey + 0.8 * strength[..., None] * (red - grey)
    return Image.fromarray(mixed.round().astype(np.uint8))


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    pipe = bundled_pipeline()

    def draw() -> Image.Image:
        generator = torch.Generator().manual_seed(args.seed)
        options = dict(num_inference_steps=args.steps, guidance_scale=args.guidance_scale, generator=generator)
        return pipe(args.prompt, **options).images[0]

    with scfg_fast.watch(pipe, words=args.words) as maps:
        stock = draw()
    columns = [stock] + [heat(stock, maps.shares(word)[0]) for word in args.words]

    handle = scfg_fast.enable(pipe, SCFGConfig(rate_min=1.0, rate_max=1.0), rates={args.words[0]: 2.0})
    columns.append(draw())
    print(f"{args.words[0]} times 2: acts as {handle.stats.effective_weight:.2f}")

    mask = maps.mask(args.words[0], step=len(maps.steps) // 2).float()[:, None]  # [1, 1, h, w], one per cell
    size = (pipe.unet.config.sample_size,) * 2
    handle = scfg_fast.enable(pipe, rates=0.5 + 0.5 * F.interpolate(mask, size))  # [1, 1, H, W], one per latent pixel
    columns.append(draw())
    print(f"half outside of {args.words[0]}: acts as {handle.stats.effective_weight:.2f}")

    sheet = Image.new("RGB", (sum(column.width for column in columns), stock.height))
    for index, column in enumerate(columns):
        sheet.paste(column, (index * stock.width, 0))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
