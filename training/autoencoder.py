"""Train the autoencoder of the bundled model: 256 x 256 x 3 pixels <-> 64 x 64 x 4 latents.

Loss on random crops x with latent z = E(x), reconstruction r = D(z + 0.08 n)::

    |r - x| + (r - x)^2 + 0.5 |grad r - grad x|                      sharp pictures
    + 0.02 ((mean z)^2 + (var z - 1)^2 + 0.02 relu(|z| - 2.5)^2)     latents that suit diffusion
    + w (z[:3] - whitened average-pooled RGB of x), w from 0.52 to 0.02 over training

The last term hands the encoder the local mean colour on day one. Without it chroma needs many times longer to appear.

    python -m training.autoencoder --sprites package/assets --data DATA --minutes 11
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models import AutoencoderTiny
from PIL import Image

from lab.scenes import Scene, to_model_range
from training.distributed import average_gradients, launch
from training.files import replacing
from training.scenes import AUTOENCODER_SEED, HELD_OUT_SEED, SceneRenderer
from training.sprites import load_sprites

CROP = 80
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.08


def build_autoencoder() -> AutoencoderTiny:
    """A fresh autoencoder: factor 4, 4 latent channels, 0.35 M parameters."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] (clipped) -> uint8 [..., H, W, 3]."""
    return ((images.clamp(-1, 1) + 1.0) * 127.5).round().byte().movedim(-3, -1).numpy()


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture in [-1, 1]; [N, 3, H, W] -> [N]."""
    error = (reconstructions.clamp(-1, 1) - images).pow(2).mean((1, 2, 3))
    return 10.0 * torch.log10(4.0 / error)


def _whitening(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [3] and matrix [3, 3] that whiten the 4x4-pooled colours of uint8 [N, S, S, 3]."""
    pooled = F.avg_pool2d(to_model_range(images), 4).movedim(1, 0).reshape(3, -1)
    values, vectors = torch.linalg.eigh(torch.cov(pooled))
    return pooled.mean(1), (vectors / values.sqrt().clamp_min(0.05)).flip(1).T.contiguous()


def _crops(scenes: list[Scene], count: int, rng: np.random.Generator) -> torch.Tensor:
    """float32 [count, 3, CROP, CROP]; four of five crops are centred near a pixel of an object."""
    crops = []
    for scene in (scenes[i] for i in rng.integers(len(scenes), size=count)):
        side = scene.image.shape[0]
        centre = rng.integers(0, side, size=2)
        if rng.random() < 0.8:
            x0, y0, x1, y1 = scene.objects[rng.integers(len(scene.objects))].box
            centre = np.array([rng.integers(y0, y1), rng.integers(x0, x1)])
        top, left = (centre - CROP // 2).clip(0, side - CROP)
        crops.append(scene.image[top : top + CROP, left : left + CROP])
    return to_model_range(np.stack(crops))


def _train(rank: int, ranks: int, args: argparse.Namespace) -> None:
    renderer = SceneRenderer(load_sprites(args.sprites))
    first = AUTOENCODER_SEED + rank * args.scenes
    scenes = [renderer.render(first + i, "full" if i % 2 else "close") for i in range(args.scenes)]
    full = torch.from_numpy(np.stack([s.image for s in scenes[1:600:2]]))
    mean, whiten = _whitening(full)
    dist.broadcast(mean, 0)
    dist.broadcast(whiten, 0)

    torch.manual_seed(args.seed)
    vae = build_autoencoder()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    torch.manual_seed(args.seed + 1 + rank)
    rng = np.random.default_rng(args.seed + rank)
    start, step, done = time.time(), 0, 0.0
    while done < 1.0:
        scale = min(1.0, (step + 1) / 100) * (0.5 * (1.0 + math.cos(math.pi * done)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        x = _crops(scenes, args.batch, rng)
        z = vae.encoder(x)
        r = vae.decoder(z + LATENT_NOISE * torch.randn_like(z))
        pixel = (r - x).abs().mean() + (r - x).pow(2).mean()
        edges = sum((r.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        shape = (z.mean((0, 2, 3)).square() + (z.var((0, 2, 3)) - 1.0).square()).mean()
        shape = shape + 0.02 * F.relu(z.abs() - 2.5).square().mean()
        colors = torch.einsum("dc,bchw->bdhw", whiten, F.avg_pool2d(x, 4) - mean[:, None, None])
        guide = F.smooth_l1_loss(z[:, :3], colors)
        loss = pixel + 0.5 * edges + 0.02 * shape + (0.5 * (1.0 - done) ** 2 + 0.02) * guide
        optimizer.zero_grad()
        loss.backward()
        fraction = (time.time() - start) / (60.0 * args.minutes)
        done, mean_pixel, mean_guide = average_gradients(parameters, [fraction, pixel.item(), guide.item()])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if rank == 0 and step % 50 == 0:
            print(
                f"step {step} {time.time() - start:.0f}s pixel {mean_pixel:.4f} guide {mean_guide:.4f} "
                f"latent std {z.std().item():.2f} max {z.abs().max().item():.1f}",
                flush=True,
            )
    if rank == 0:
        _finish(vae.eval(), renderer, full, step, args)


@torch.no_grad()
def _finish(
    vae: AutoencoderTiny, renderer: SceneRenderer, full: torch.Tensor, steps: int, args: argparse.Namespace
) -> None:
    """Set the scaling factor, measure held-out scenes, save weights, figures and a picture of reconstructions."""
    latents = vae.encoder(to_model_range(full[:64]))
    vae.register_to_config(scaling_factor=round(float(1.0 / latents.std()), 4))
    held_out = to_model_range(np.stack([renderer.render(HELD_OUT_SEED + i).image for i in range(64)]))
    rebuilt = torch.cat([vae.decoder(vae.encoder(x)) for x in held_out.split(8)])
    quality = psnr(held_out, rebuilt)
    report = {
        "steps": steps,
        "minutes": args.minutes,
        "crops_seen": steps * args.batch * args.ranks,
        "seed": args.seed,
        "held_out_scenes": len(held_out),
        "psnr_mean_db": round(quality.mean().item(), 2),
        "psnr_min_db": round(quality.min().item(), 2),
        "latent_std_per_channel": [round(v, 3) for v in latents.std((0, 2, 3)).tolist()],
    }
    print(json.dumps(report), flush=True)
    with replacing(Path(args.data) / "vae") as folder:
        vae.save_pretrained(folder)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        pairs = torch.cat([torch.cat(list(part[:8]), 2) for part in (held_out, rebuilt)], 1)
        Image.fromarray(to_pixels(pairs)).save(folder / "reconstructions.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", required=True, help="folder with the .webp sprites")
    parser.add_argument("--data", required=True, help="working folder; writes DATA/vae")
    parser.add_argument("--minutes", type=float, default=11.0, help="training time after rendering")
    parser.add_argument("--batch", type=int, default=10, help="crops per rank and step")
    parser.add_argument("--scenes", type=int, default=900, help="training scenes per rank")
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    launch(_train, args.ranks, args)


if __name__ == "__main__":
    main()
