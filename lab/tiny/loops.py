"""The denoiser of a tiny pipeline in loops that tests write out themselves."""

from __future__ import annotations

from typing import Any

import torch

PROMPTS, NEGATIVES = ["a red cat", "a blue boat"], ["", "a car"]


class Literal:
    """The parts of one call of a tiny Stable Diffusion or SDXL pipeline with `PROMPTS` and `NEGATIVES`.

    Attributes:
        scheduler: the pipeline's, with its timesteps set.
        conditioning: further arguments of the denoiser, for the batch [unconditional; conditional].
        start: the noise that a call with one generator per seed begins with, [B, 4, 16, 16].
    """

    def __init__(self, pipe: Any, steps: int, *, seeds: tuple[int, ...] = (0, 1)) -> None:
        cond, uncond, *pooled = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVES
        )
        self.conditioning: dict[str, Any] = {"encoder_hidden_states": torch.cat([uncond, cond])}
        if pooled:
            sizes = torch.tensor([[128, 128, 0, 0, 128, 128]], dtype=cond.dtype).repeat(4, 1)
            self.conditioning["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": sizes}
        self.unet, self.scheduler = pipe.unet, pipe.scheduler
        self.scheduler.set_timesteps(steps)
        shape, dtype = (1, 4, 16, 16), pipe.unet.dtype
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
        self.start = torch.cat(noise) * self.scheduler.init_noise_sigma

    def halves(self, uncond_input: torch.Tensor, cond_input: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(unconditional, conditional) prediction, [B, 4, 16, 16] each; differentiable."""
        both = torch.cat([uncond_input, cond_input])
        return self.unet(both, t, **self.conditioning).sample.chunk(2)
