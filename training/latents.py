"""Render scenes once, encode them once, and keep what the diffusion training reads.

A cache is a folder ``DATA/latents-<layout>`` with N rows in

* ``latents.npy``: float16 [N, 4, S/4, S/4], autoencoder output before scaling;
* ``tokens.npy``:  int16 [N, 24], the encoded caption;
* ``masks.npy``:   uint8 [N, 3, S/16, S/16], coverage times 255 of first object, second object, background;
* ``slots.npy``:   int8 [N, 3, 2], positions in ``tokens`` of the noun and the colour word that name each mask, or -1;
* ``meta.json``:   layout, first seed, count, scaling factor.

Row i is scene ``first_seed + i``, so a cache is reproducible from the sprites, the autoencoder and this code.

    python -m training.latents --sprites package/assets --data DATA --layout close --count 40000
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models import AutoencoderTiny
from transformers import CLIPTokenizer

from lab.scenes import Scene, to_model_range
from training.distributed import launch
from training.files import replacing
from training.scenes import LAYOUTS, SceneRenderer
from training.sprites import load_sprites
from training.tokenizer import MAX_TOKENS, load_tokenizer

MASK_CELL = 16
"""Pixels per side of a mask cell; one cell is one position of the finest cross-attention map."""

SLOTS = 3
"""Masks per scene: first object, second object, background."""

_CHUNK = 16


@dataclass(frozen=True)
class LatentCache:
    """An opened cache; arrays are memory-mapped and documented in the module's header."""

    latents: np.ndarray
    tokens: np.ndarray
    masks: np.ndarray
    slots: np.ndarray
    scaling_factor: float

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows as tensors: latents float32 (scaled), tokens int64, masks float32 in [0, 1], slots int64."""
        return {
            "latents": torch.from_numpy(self.latents[rows].astype(np.float32)) * self.scaling_factor,
            "tokens": torch.from_numpy(self.tokens[rows].astype(np.int64)),
            "masks": torch.from_numpy(self.masks[rows].astype(np.float32)) / 255.0,
            "slots": torch.from_numpy(self.slots[rows].astype(np.int64)),
        }


def open_cache(data: str | Path, layout: str) -> LatentCache:
    """Open ``DATA/latents-<layout>``.

    Raises:
        FileNotFoundError: if the cache has not been made.
    """
    folder = Path(data) / f"latents-{layout}"
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"{folder} is missing; make it with python -m training.latents")
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "tokens", "masks", "slots")}
    return LatentCache(**arrays, scaling_factor=meta["scaling_factor"])


def scene_masks(scene: Scene) -> np.ndarray:
    """uint8 [3, S/16, S/16]: share of each cell covered by object 0, object 1 and neither, times 255."""
    side = scene.image.shape[0]
    full = np.zeros((SLOTS, side, side), np.float32)
    full[: len(scene.masks)] = scene.masks
    full[-1] = 1.0 - full[:-1].sum(0)
    cells = side // MASK_CELL
    coverage = full.reshape(SLOTS, cells, MASK_CELL, cells, MASK_CELL).mean((2, 4))
    return (coverage * 255.0).round().astype(np.uint8)


def scene_slots(scene: Scene, tokens: list[str]) -> np.ndarray:
    """int8 [3, 2]: where the caption's tokens name object 0, object 1 and the background; -1 where they do not.

    Args:
        tokens: the caption as token strings, start token first.
    """
    slots = np.full((SLOTS, 2), -1, np.int8)
    for row, item in enumerate(scene.objects):
        noun = tokens.index(f"{item.name}</w>")
        slots[row] = noun, noun - 1 if item.word is not None else -1
    head = scene.background if scene.background in ("meadow", "beach") else "background"
    if f"{head}</w>" in tokens:
        position = tokens.index(f"{head}</w>")
        slots[-1] = position, position - 1 if head == "background" else -1
    return slots


def encode_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    """Captions -> token ids padded or cut to 24."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids


@torch.no_grad()
def _encode(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    renderer = SceneRenderer(load_sprites(args.sprites))
    vae = AutoencoderTiny.from_pretrained(Path(args.data) / "vae").eval()
    tokenizer = load_tokenizer(Path(args.data) / "tokenizer")
    out = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r+") for name in _shapes(args.layout, 0)}
    start = time.time()
    for index, first in enumerate(range(rank * _CHUNK, args.count, ranks * _CHUNK)):
        last = min(first + _CHUNK, args.count)
        scenes = [renderer.render(args.first_seed + row, args.layout) for row in range(first, last)]
        ids = encode_captions(tokenizer, [scene.caption for scene in scenes])
        out["tokens"][first:last] = ids
        out["masks"][first:last] = [scene_masks(scene) for scene in scenes]
        out["slots"][first:last] = [
            scene_slots(scene, cast(list[str], tokenizer.convert_ids_to_tokens(row)))
            for scene, row in zip(scenes, ids, strict=True)
        ]
        images = to_model_range(np.stack([scene.image for scene in scenes]))
        out["latents"][first:last] = vae.encoder(images).numpy()
        if rank == 0 and index % 100 == 99:
            print(f"{last} of {args.count} in {time.time() - start:.0f}s", flush=True)
    for array in out.values():
        array.flush()


def _shapes(layout: str, count: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    side = LAYOUTS[layout]
    return {
        "latents": (np.float16, (count, 4, side // 4, side // 4)),
        "tokens": (np.int16, (count, MAX_TOKENS)),
        "masks": (np.uint8, (count, SLOTS, side // MASK_CELL, side // MASK_CELL)),
        "slots": (np.int8, (count, SLOTS, 2)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", required=True, help="folder with the .webp sprites")
    parser.add_argument("--data", required=True, help="working folder; writes DATA/latents-LAYOUT")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args(argv)
    with replacing(Path(args.data) / f"latents-{args.layout}") as folder:
        folder.mkdir()
        for name, (dtype, shape) in _shapes(args.layout, args.count).items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
        launch(_encode, args.ranks, str(folder), args)
        vae_config = json.loads((Path(args.data) / "vae" / "config.json").read_text())
        meta = {
            "layout": args.layout,
            "first_seed": args.first_seed,
            "count": args.count,
            "scaling_factor": vae_config["scaling_factor"],
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


if __name__ == "__main__":
    main()
