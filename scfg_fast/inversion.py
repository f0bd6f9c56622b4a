"""From a picture to the noise that makes it: DDIM backwards, with plain guidance or CFG++.

`invert` runs the pipeline itself, with its scheduler turned round for the call, so whatever the pipeline does with
prompts, sizes and adapters holds here too. The noise goes back in as ``latents``::

    noise = invert(pipe, "a cat on a mat", image=picture, num_inference_steps=50)
    again = pipe("a cat on a mat", latents=noise, num_inference_steps=50)
    edited = pipe("a dog on a mat", latents=noise, num_inference_steps=50)

Each step solves the DDIM step for its input, with the prediction taken at its output, where the solution is not known
yet: exact for a denoiser that does not look at the latents, and off by the change of the prediction over one step for a
real one. With CFG++ that change is scaled by lam in [0, 1] where plain guidance scales it by guidance_scale.

Source: CFG++ (arXiv 2406.08070), section on inversion and editing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler, DDIMSchedulerOutput

from .pipelines.checks import overflows


class DDIMExactInverseScheduler(DDIMInverseScheduler):
    """DDIM from the picture to the noise; each step is the algebraic inverse of `DDIMScheduler`'s.

    The base class reads a v-prediction at the level that the step leaves, where the denoiser was told the level that it
    leads to; then inversion and sampling are not inverse to each other.
    """

    @property
    def final_alpha_cumprod(self) -> torch.Tensor:
        return self.initial_alpha_cumprod

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """x at `timestep` from x' one step nearer to the picture.

        With the prediction f, DDIM goes x' = A x + B f; this is x = (x' - B f) / A.
        """
        config: Any = self.config
        before = int(timestep) - config.num_train_timesteps // self.num_inference_steps
        noisy = self.alphas_cumprod[int(timestep)]
        clean = self.alphas_cumprod[before] if before >= 0 else self.initial_alpha_cumprod
        signal, spread = noisy**0.5, (1.0 - noisy) ** 0.5
        next_signal, next_spread = clean**0.5, (1.0 - clean) ** 0.5
        a, b = {
            "epsilon": (next_signal / signal, next_spread - next_signal * spread / signal),
            "v_prediction": (next_signal * signal + next_spread * spread, next_spread * signal - next_signal * spread),
        }[config.prediction_type]
        noisier = (sample - b * model_output) / a
        return DDIMSchedulerOutput(prev_sample=noisier) if return_dict else (noisier,)


def invert(
    pipe: Any,
    prompt: str | list[str],
    *,
    image: Any = None,
    latents: torch.Tensor | None = None,
    num_inference_steps: int = 50,
    **kwargs: Any,
) -> torch.Tensor:
    """The noise from which the pipeline makes this picture.

    Args:
        pipe: a text-to-image pipeline with a `DDIMScheduler`, enabled or not; S-CFG and CFG++ take part. What depends
            on the place in the run (schedules, intervals) or moves the sample (loss guidance) is refused.
        prompt: that describes the picture.
        image: what the pipeline's image processor takes (PIL, array, tensor), one per prompt; or
        latents: [B, C, H, W], scaled as the denoiser sees them.
        num_inference_steps: as will be used to sample.
        **kwargs: of the pipeline's call, such as guidance_scale and negative_prompt; as will be used to sample.

    Returns:
        Latents [B, C, H, W] for the ``latents`` of a call with the same arguments.

    Raises:
        ValueError: the pipeline has no UNet; the scheduler is not a `DDIMScheduler`, spaces its steps otherwise than
            "leading" or "trailing", clips or predicts the sample; not exactly one of `image` and `latents` is given; an
            argument that cannot be chosen; or something is enabled that an inversion cannot take.
    """
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"invert: {type(pipe).__name__} has no UNet; pipelines of Stable Diffusion and SDXL have")
    scheduler = pipe.scheduler
    if type(scheduler).__name__ != "DDIMScheduler":
        raise ValueError(
            f"invert: {type(scheduler).__name__} has no inverse here; use "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
        )
    if scheduler.config.timestep_spacing not in ("leading", "trailing"):
        raise ValueError(
            f"invert: timestep_spacing={scheduler.config.timestep_spacing!r} has no inverse here; use 'leading' or "
            "'trailing'"
        )
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError("invert: a scheduler that clips (clip_sample, thresholding) cannot be inverted; turn it off")
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"invert: prediction_type={scheduler.config.prediction_type!r} has no noise at the picture")
    fixed = sorted({"output_type", "return_dict", "eta"} & set(kwargs))
    if fixed:
        raise ValueError(f"invert: {', '.join(fixed)} cannot be chosen: latents are returned, and no noise is added")
    if (image is None) == (latents is None):
        raise ValueError("invert: give the picture as image or as latents, and not as both")
    start = (encode(pipe, image) if latents is None else latents).to(pipe.unet.dtype)
    pipe.scheduler = DDIMExactInverseScheduler.from_config(scheduler.config)
    try:
        return pipe(
            prompt, latents=start, num_inference_steps=num_inference_steps, output_type="latent", **kwargs
        ).images
    finally:
        pipe.scheduler = scheduler


@torch.no_grad()
def encode(pipe: DiffusionPipeline, image: Any) -> torch.Tensor:
    """The latents [B, C, H/8, W/8] of a picture, scaled as the denoiser sees them; the mode of the encoder's answer.

    Raises:
        ValueError: the vae is in fp16 and overflows there (SDXL's own).
    """
    if overflows(pipe):
        raise ValueError("invert: this vae overflows in fp16; give latents, or call pipe.vae.to(torch.float32) before")
    anything: Any = pipe
    vae = anything.vae
    pixels = anything.image_processor.preprocess(image).to(anything._execution_device, vae.dtype)
    output = vae.encode(pixels)
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    latents = latents - (getattr(vae.config, "shift_factor", None) or 0.0)
    if mean is not None and deviation is not None:
        shape = (1, -1, 1, 1)
        latents = (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(deviation).view(shape)
    return latents * vae.config.scaling_factor
