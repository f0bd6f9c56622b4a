"""S-CFG as a guider, for diffusers' modular pipelines.

A modular pipeline runs the denoiser twice per step, conditional first, and asks its guider to combine the two
predictions. `SCFGGuidance` captures the maps of both passes and combines by region::

    pipe.update_components(guider=SCFGGuidance(guidance_scale=5.0))

Capture surrounds the denoiser's forward for one pass and takes itself out in a `finally`, because the modular loop has
none. The guider's `save_pretrained` and `from_pretrained` keep its configuration.
`ModularPipeline.save_pretrained` drops a guider that was set by `update_components`, whatever its class; load it
through a `ComponentSpec` with a path to have it saved with the pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.models import UNet2DConditionModel

from .capture import StepMaps
from .config import SCFGConfig
from .guidance.steps import in_part
from .hooks import RegionFinder, SCFGWarning, Segments, Stats, guide_by_pixel
from .install import CapturedBlock, CaptureSet, claimed, installed, unwrap
from .processors import BatchLayout
from .regions import Regions
from .views import Geometry


class SCFGGuidance(ClassifierFreeGuidance):
    """Semantic-aware classifier-free guidance for modular pipelines with a `UNet2DConditionModel` (SDXL).

    Args:
        guidance_scale: g.
        guidance_rescale: phi of "Common Diffusion Noise Schedules and Sample Steps are Flawed", 0 for none.
        start, stop: fractions of the steps between which there is guidance at all; outside, the conditional prediction
            alone, in one pass.
        enabled: False for no guidance.
        scfg: fields of `SCFGConfig` that differ from its defaults. `foreground="auto"` asks once per run, at the first
            step, whether the negative embedding is all zeros.

    Attributes:
        regions: `Regions` of the last step, or None.
        stats: `Stats` of the run; reset at step 0.

    Raises:
        ValueError: a field of `scfg` is unknown, out of range or not for guiders (`tokens="words"`); or, when it is
            used, the denoiser is not a `UNet2DConditionModel` or has none of the layers.

    Source: the same method as `scfg_fast.enable` (arXiv 2404.05384).
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, False, start, stop, enabled)
        self.scfg_config = SCFGConfig.from_dict(dict(scfg or {}))
        self.regions: Regions | None = None
        self.stats = Stats()
        self._captures = CaptureSet()
        self._blocks: list[CapturedBlock] = []
        self._maps: dict[str, list[tuple[torch.Tensor | None, torch.Tensor | None]]] = {}
        if self.scfg_config.tokens != "all":
            raise ValueError("SCFGGuidance: a guider does not see the prompt's text; use tokens='all'")
        self._finder = RegionFinder(self.scfg_config)
        self._foreground = "unconditional"
        self._guided_steps = 0
        self._warned = False
        self._pass: contextlib.ExitStack | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._close()
            self._maps = {}
            self.regions, self.stats, self._guided_steps = None, Stats(), 0
            self._finder = RegionFinder(self.scfg_config)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """As for plain guidance; at step 0, decides which half the foreground is read from."""
        if self._step == 0 and self.scfg_config.foreground == "auto":
            pairs = [value for name, value in data.items() if name in ("prompt_embeds", "encoder_hidden_states")]
            zeroed = any(isinstance(p, tuple) and p[1] is not None and not bool(p[1].any()) for p in pairs)
            self._foreground = "conditional" if zeroed else "unconditional"
        elif self.scfg_config.foreground != "auto":
            self._foreground = self.scfg_config.foreground
        return super().prepare_inputs(data)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        self._close()
        branch = "conditional" if self.is_conditional else "unconditional"
        if not self._needs_maps() or (branch == "unconditional" and self._foreground == "conditional"):
            return
        unet = unwrap(denoiser)
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                f"SCFGGuidance: the denoiser is a {type(unet).__name__}, S-CFG reads the attention of a "
                "UNet2DConditionModel; use ClassifierFreeGuidance there"
            )
        blocks = self._blocks = self._captures.blocks(unet, self.scfg_config)
        self.stats.layers = tuple(block.info.name for block in blocks)
        # Compiled in place, `forward` is traced; the compiled call is what can be surrounded.
        name = "forward" if denoiser.__dict__.get("_compiled_call_impl") is None else "_compiled_call_impl"
        forward = getattr(denoiser, name)
        shadowed = denoiser.__dict__.get(name)

        @functools.wraps(forward)
        def capturing(*args, **kwargs):
            try:
                with claimed(unet), installed(unet, blocks):
                    for block in blocks:
                        block.prepare(True, BatchLayout(1, self._foreground, branch), Geometry(1, 0, 0))
                    output = forward(*args, **kwargs)
                    self._maps[branch] = [(block.maps.tokens, block.maps.start) for block in blocks]
                    return output
            finally:
                self._close()

        self._pass = contextlib.ExitStack()
        if shadowed is None:
            self._pass.callback(denoiser.__dict__.pop, name)
        else:
            self._pass.callback(denoiser.__dict__.__setitem__, name, shadowed)
        denoiser.__dict__[name] = capturing

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        super().cleanup_models(denoiser)
        self._close()

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Combine by region where this step has regions, else as plain guidance."""
        maps, self._maps = self._maps, {}
        config = self.scfg_config
        plain = config.rates == "none" or not self._is_cfg_enabled() or not self._in_window()
        if plain or pred_uncond is None:
            return super().forward(pred_cond, pred_uncond)
        dtype = torch.promote_types(pred_cond.dtype, torch.float32)
        weight = torch.full((), self.guidance_scale, dtype=dtype, device=pred_cond.device)
        if config.rates == "pixels":
            pred, _ = guide_by_pixel(config, pred_uncond, pred_cond, weight, rescale=self.guidance_rescale)
        else:
            step_maps = self._take_maps(maps, pred_cond) if maps else None
            if step_maps is None and self._finder.segments is None:
                raise RuntimeError("SCFGGuidance: no captured layer left a usable attention map")
            pred, rate = self._finder.guide(step_maps, pred_uncond, pred_cond, weight, "guided", self.guidance_rescale)
            token_index, foreground, _ = cast(Segments, self._finder.segments)
            self.regions = Regions(self._step, token_index, foreground, rate)
        self._guided_steps += 1
        self.stats.steps_applied += 1
        self.stats.weights.append(float(self.guidance_scale))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _in_window(self) -> bool:
        return in_part(self._step or 0, self._num_inference_steps or 1, self.scfg_config.start, self.scfg_config.stop)

    def _needs_maps(self) -> bool:
        """Whether this step needs maps."""
        if not self._is_cfg_enabled() or not self._in_window() or self.scfg_config.rates != "regions":
            return False
        return self._finder.segments is None or self._guided_steps % self.scfg_config.reuse_every == 0

    def _take_maps(self, maps: dict[str, list], pred: torch.Tensor) -> StepMaps | None:
        tokens = [tokens for tokens, _ in maps["conditional"]]
        starts = [start for _, start in maps[self._foreground]]
        layers = [
            (block.info, SimpleNamespace(tokens=t, start=s))
            for block, t, s in zip(self._blocks, tokens, starts, strict=True)
        ]
        step_maps, missing = self._finder.take(layers, (pred.shape[-2], pred.shape[-1]))
        self.stats.bytes = max(self.stats.bytes, self._finder.nbytes)
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"scfg_fast: layers {missing} left no usable attention map. The other layers are used.",
                SCFGWarning,
                stacklevel=2,
            )
        return step_maps

    def _close(self) -> None:
        """Remove what the last pass installed; harmless if there is nothing."""
        stack, self._pass = self._pass, None
        if stack is not None:
            stack.close()
