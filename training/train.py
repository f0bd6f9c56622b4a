"""Train the denoiser and its text encoder on cached latents.

Start on close-ups, which cost a quarter, then go on with full scenes from the same state::

    python -m training.train --data DATA --layout close --minutes 40
    python -m training.train --data DATA --layout full --minutes 45 --decay-minutes 12 --resume

``DATA/runs/<name>/state.pt`` (weights, moving averages, optimizer, counters) is written every few minutes and at the
end; ``--resume`` continues it exactly. The last ``--decay-minutes`` take the learning rate to zero; the state from just
before is kept as ``state-constant.pt``, and a longer training continues from there (``--resume state-constant.pt``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models import UNet2DConditionModel
from transformers import CLIPTextModel

from training.distributed import all_mean, average_gradients, launch
from training.files import replacing
from training.latents import LatentCache, encode_captions, open_cache
from training.muon import Muon
from training.network import (
    CrossAttentionRecorder,
    build_scheduler,
    build_text_encoder,
    build_unet,
    diffusion_loss,
    token_loss,
)
from training.tokenizer import load_tokenizer

HELD_OUT = 256
"""The last rows of every cache are never trained on."""

TIMESTEP_LOGIT = (0.3, 1.2)
"""Mean and standard deviation of logit(t / 1000) under ``timesteps="logit-normal"``."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides an update, apart from the data and the networks.

    Attributes:
        batch: pictures per rank and step.
        learning_rate: peak step size, AdamW scale.
        optimizer: "muon" (hidden weights by Muon, the rest by AdamW) or "adamw".
        warmup: steps of linear warm-up, counted anew for each layout.
        ema: decay of the moving average of the weights.
        token_weight: weight of the token loss.
        caption_dropout: share of captions replaced by the empty one, which guidance needs.
        timesteps: "uniform", or "logit-normal": more of the steps at which shapes are decided and fewer of both ends,
            the logit-normal density of Esser et al. 2024 (arXiv:2403.03206, section 3.1) with :data:`TIMESTEP_LOGIT`.
        focus: words; a scene whose caption holds one of them is drawn ``focus_weight`` times as often as another.
        focus_weight: see ``focus``.
        seed: of initial weights, batches, noise and dropout.
    """

    batch: int = 24
    learning_rate: float = 3e-3
    optimizer: str = "muon"
    warmup: int = 100
    ema: float = 0.995
    token_weight: float = 0.1
    caption_dropout: float = 0.1
    timesteps: str = "uniform"
    focus: tuple[str, ...] = ()
    focus_weight: float = 3.0
    seed: int = 0


class Trainer:
    """The state of a training and its update rule. Randomness is a function of (seed, step, rank), so a restored state
    continues bit for bit.

    Args:
        unet, text_encoder: the networks, trained in place.
        empty: the token ids of the empty caption.
        config: see :class:`TrainConfig`.
        rank, ranks: this process and their number.
        focus: the token ids of ``config.focus``.

    Raises:
        ValueError: for an unknown ``optimizer`` or ``timesteps``.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        empty: list[int],
        config: TrainConfig,
        rank: int = 0,
        ranks: int = 1,
        focus: tuple[int, ...] = (),
    ) -> None:
        if config.timesteps not in ("uniform", "logit-normal"):
            raise ValueError(f"timesteps must be 'uniform' or 'logit-normal', not {config.timesteps!r}")
        self.unet, self.text_encoder, self.config = unet, text_encoder, config
        self.rank, self.ranks = rank, ranks
        self._empty = torch.tensor(empty)
        self._focus = np.array(focus)
        self._recorder = CrossAttentionRecorder()
        self._recorder.install(unet)
        self._alphas = build_scheduler().alphas_cumprod
        self._parameters = [*unet.parameters(), *text_encoder.parameters()]
        self.average = [p.detach().clone() for p in self._parameters]
        self._optimizers = self._build_optimizers()
        self.step = 0
        self.stage_step = 0

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        adamw: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}
        if config.optimizer == "adamw":
            return [torch.optim.AdamW(self._parameters, **adamw)]
        if config.optimizer != "muon":
            raise ValueError(f"optimizer must be 'muon' or 'adamw', not {config.optimizer!r}")
        outer = {"conv_in.weight", "conv_out.weight"}
        named = [*self.unet.named_parameters(), *self.text_encoder.named_parameters()]
        hidden = [p for name, p in named if p.ndim >= 2 and name not in outer and "embedding.weight" not in name]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        return [Muon(hidden, config.learning_rate), torch.optim.AdamW(rest, **adamw)]

    def update(self, cache: LatentCache, scale: float = 1.0, extra: tuple[float, ...] = ()) -> dict[str, Any]:
        """Draw a batch and take one step.

        Args:
            cache: training data; its last :data:`HELD_OUT` rows are left out.
            scale: factor on the learning rate, on top of warm-up.
            extra: numbers to average over the ranks in the same message.

        Returns:
            loss and token (means over the ranks), gradient_norm, lr, and extra.
        """
        config = self.config
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + self.step) * 64 + self.rank)
        batch = cache.batch(self._draw_rows(cache, generator))
        dropped = torch.rand(config.batch, generator=generator) < config.caption_dropout
        tokens = torch.where(dropped[:, None], self._empty, batch["tokens"])
        # Stratified steps: the batch covers the whole range evenly, which takes variance out of the loss.
        strata = (torch.arange(config.batch) * self.ranks + self.rank) / (config.batch * self.ranks)
        jitter = torch.rand(config.batch, generator=generator) / (config.batch * self.ranks)
        time = strata + jitter
        if config.timesteps == "logit-normal":
            mean, deviation = TIMESTEP_LOGIT
            time = torch.sigmoid(mean + deviation * torch.special.ndtri(time))
        steps = (time * 1000).long().clamp(max=999)
        noise = torch.randn(batch["latents"].shape, generator=generator)
        loss, attention = self._losses(batch, tokens, ~dropped, steps, noise)
        (loss + config.token_weight * attention).backward()

        mean_loss, token, *means = average_gradients(self._parameters, [loss.item(), attention.item(), *extra])
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        rate = config.learning_rate * scale * min(1.0, (self.stage_step + 1) / config.warmup)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.stage_step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self._parameters], 1.0 - decay)
        return {"loss": mean_loss, "token": token, "gradient_norm": norm.item(), "lr": rate, "extra": means}

    def _draw_rows(self, cache: LatentCache, generator: torch.Generator) -> np.ndarray:
        """Rows of the next batch, with replacement. Under ``focus``, scenes without its words are thinned out."""
        config = self.config
        candidates = math.ceil(8 * config.focus_weight) * config.batch if len(self._focus) else config.batch
        rows = torch.randint(len(cache) - HELD_OUT, (candidates,), generator=generator).numpy()
        if not len(self._focus):
            return rows
        wanted = np.isin(cache.tokens[rows], self._focus).any(1)
        kept = wanted | (torch.rand(candidates, generator=generator).numpy() < 1.0 / config.focus_weight)
        return np.concatenate([rows[kept], rows[~kept]])[: config.batch]

    def _losses(
        self,
        batch: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        captioned: torch.Tensor,
        steps: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self._alphas[steps]
        a = alphas.view(-1, 1, 1, 1)
        noisy = a.sqrt() * batch["latents"] + (1.0 - a).sqrt() * noise
        text = self.text_encoder(tokens).last_hidden_state
        self._recorder.clear()
        prediction = self.unet(noisy, steps, text).sample
        loss = diffusion_loss(prediction, batch["latents"], noise, alphas)
        weight = captioned * alphas.sqrt()
        return loss, token_loss(self._recorder.maps, batch["masks"], batch["slots"], weight)

    @torch.no_grad()
    def held_out_loss(self, cache: LatentCache, count: int = 64) -> float:
        """Diffusion loss of the averaged weights on rows, noise and steps that never change; mean over the ranks."""
        rows = len(cache) - HELD_OUT + self.rank * count + np.arange(count)
        generator = torch.Generator().manual_seed(self.rank)
        total = 0.0
        with self.averaged_weights():
            for part in np.split(rows, 4):
                batch = cache.batch(part)
                steps = torch.linspace(5, 994, len(part)).long()
                noise = torch.randn(batch["latents"].shape, generator=generator)
                keep = torch.ones(len(part), dtype=torch.bool)
                total += self._losses(batch, batch["tokens"], keep, steps, noise)[0].item() / 4
        return all_mean(torch.tensor([total])).item()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the networks hold their moving averages."""
        kept = [p.detach().clone() for p in self._parameters]
        _write(self._parameters, self.average)
        try:
            yield
        finally:
            _write(self._parameters, kept)

    def use_average(self) -> None:
        """Put the moving averages into the networks for good, to export them."""
        _write(self._parameters, self.average)

    def start_stage(self) -> None:
        """Warm up again, for new data or another learning rate."""
        self.stage_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to continue exactly."""
        return {
            "step": self.step,
            "stage_step": self.stage_step,
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "average": self.average,
            "optimizer_kind": self.config.optimizer,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: if the state was made by another kind of optimizer.
        """
        if state["optimizer_kind"] != self.config.optimizer:
            raise ValueError(f"the state was made with --optimizer {state['optimizer_kind']}")
        self.step, self.stage_step = state["step"], state["stage_step"]
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)
        for optimizer, theirs in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(theirs)


@torch.no_grad()
def _write(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def learning_rate_scale(elapsed: float, total: float, decay: float) -> float:
    """1 until the last ``decay`` seconds of ``total``, then half a cosine to 0; all in seconds."""
    left = total - elapsed
    if decay <= 0.0 or left >= decay:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * max(0.0, left) / decay))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a ``state.pt``.

    Raises:
        FileNotFoundError: with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training state at {path}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _train(rank: int, ranks: int, args: argparse.Namespace, config: TrainConfig) -> None:
    torch.set_flush_denormal(True)
    folder = Path(args.data) / "runs" / args.name
    cache = open_cache(args.data, args.layout)
    tokenizer = load_tokenizer(Path(args.data) / "tokenizer")
    torch.manual_seed(config.seed)
    focus = tuple(cast(list[int], tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in config.focus])))
    if tokenizer.unk_token_id in focus:
        raise ValueError(f"--focus takes words of the vocabulary, not {' '.join(config.focus)}")
    trainer = Trainer(
        build_unet(), build_text_encoder(tokenizer), encode_captions(tokenizer, [""])[0], config, rank, ranks, focus
    )
    progress: dict[str, dict[str, float]] = {}
    if args.resume:
        state = read_state(folder / args.resume)
        trainer.load_state_dict(state["trainer"])
        progress = state["progress"]
        if state["layout"] != args.layout:
            trainer.start_stage()
    done = progress.setdefault(args.layout, {"steps": 0, "images": 0, "seconds": 0.0})

    def save(name: str) -> None:
        if rank == 0:
            with replacing(folder / name) as path:
                torch.save(
                    {
                        "trainer": trainer.state_dict(),
                        "layout": args.layout,
                        "progress": progress,
                        "config": asdict(config),
                    },
                    path,
                )

    def report(record: dict[str, Any]) -> None:
        if rank == 0:
            line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()})
            print(line, flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(line + "\n")

    total, decay = 60.0 * args.minutes, 60.0 * args.decay_minutes
    start, elapsed, spent_before = time.time(), 0.0, done["seconds"]
    saved, decaying, window = 0.0, False, []
    while elapsed < total:
        scale = learning_rate_scale(elapsed, total, decay)
        if scale < 1.0 and not decaying:
            decaying = True
            save("state-constant.pt")
        record = trainer.update(cache, scale, extra=(time.time() - start,))
        elapsed = record["extra"][0]
        done["steps"] += 1
        done["images"] += config.batch * ranks
        done["seconds"] = spent_before + elapsed
        window.append((record["loss"], record["token"], record["gradient_norm"]))
        if len(window) == args.log_every:
            loss, token, norm = np.mean(window, axis=0).tolist()
            window = []
            report(
                {
                    "layout": args.layout,
                    "step": trainer.step,
                    "images": done["images"],
                    "seconds": elapsed,
                    "loss": loss,
                    "token": token,
                    "gradient_norm": norm,
                    "lr": record["lr"],
                }
            )
        if elapsed - saved >= 60.0 * args.save_minutes or elapsed >= total:
            saved = elapsed
            save("state.pt")
            held_out = trainer.held_out_loss(cache)
            report({"layout": args.layout, "step": trainer.step, "seconds": elapsed, "held_out_loss": held_out})


def main(argv: list[str] | None = None) -> None:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="working folder with tokenizer and latents-LAYOUT")
    parser.add_argument("--layout", choices=("close", "full"), required=True)
    parser.add_argument("--name", default="main", help="the run's folder under DATA/runs")
    parser.add_argument("--minutes", type=float, required=True, help="wall time of this call")
    parser.add_argument("--decay-minutes", type=float, default=0.0, help="of these, with falling learning rate")
    parser.add_argument(
        "--resume", nargs="?", const="state.pt", default=None, help="continue from this state of the run"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="pictures per rank and step")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default=defaults.optimizer)
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of warm-up for a new layout")
    parser.add_argument("--ema", type=float, default=defaults.ema)
    parser.add_argument("--token-weight", type=float, default=defaults.token_weight)
    parser.add_argument("--timesteps", choices=("uniform", "logit-normal"), default=defaults.timesteps)
    parser.add_argument("--focus", nargs="+", default=[], metavar="WORD", help="words whose scenes come more often")
    parser.add_argument("--focus-weight", type=float, default=defaults.focus_weight, help="this many times as often")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)
    config = TrainConfig(
        batch=args.batch,
        learning_rate=args.learning_rate,
        optimizer=args.optimizer,
        warmup=args.warmup,
        ema=args.ema,
        token_weight=args.token_weight,
        timesteps=args.timesteps,
        focus=tuple(args.focus),
        focus_weight=args.focus_weight,
        seed=args.seed,
    )
    launch(_train, args.ranks, args, config)


if __name__ == "__main__":
    main()
