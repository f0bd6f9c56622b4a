"""S-CFG as a guider, for diffusers' modular pipelines.

A modular pipeline runs the denoiser twice per step, conditional first, and asks its guider to combine the two
predictions. `SCFGGuidance` captures the maps of both passes and combines by region::

    pipe.update_components(guider=SCFGGuidance(guidance_scale=5.0))

It reads the denoisers of `scfg_fast.denoisers`, and sees neither the pipeline nor its autoencoder: the size of packed
latents comes from the denoiser's own call, and `cell` is taken as it is, in latent pixels.

Capture surrounds the denoiser's forward for one pass and takes itself out in a `finally`, because the modular loop has
none. The guider's `save_pretrained` and `from_pretrained` keep its configuration.
`ModularPipeline.save_pretrained` drops a guider that was set by `update_components`, whatever its class; load it
through a `ComponentSpec` with a path to have it saved with the pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config

from .capture.layers import BlockInfo
from .capture.maps import BatchLayout, BlockMaps, StepMaps
from .config import SCFGConfig
from .denoisers.base import Denoiser
from .denoisers.install import CaptureSet, HookedDenoiser, claimed, unwrap
from .denoisers.registry import denoiser_of
from .denoisers.transformers import TRANSFORMERS
from .guidance.mixing import distances
from .layouts import Geometry, Images, View
from .regions import Regions
from .step.arguments import argument
from .step.combiner import mixer_of
from .step.context import CallContext, SCFGWarning, Stats
from .step.finder import RegionFinder, Segments, guide_by_pixel
from .step.plan import StepPlan, StepState, plan, zero_step
from .step.rewrite import rewritten
from .versions import reason_against

try:
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
except ImportError as error:
    raise ImportError(reason_against("scfg_fast.guider") or str(error)) from error


class SCFGGuidance(ClassifierFreeGuidance):
    """Semantic-aware classifier-free guidance for modular pipelines: SDXL, Stable Diffusion 3, FLUX.2 klein base,
    Qwen-Image, LTX-Video, Wan.

    Args:
        guidance_scale: g.
        guidance_rescale: phi of "Common Diffusion Noise Schedules and Sample Steps are Flawed", 0 for none.
        start, stop: fractions of the steps between which there is guidance at all; outside, the conditional prediction
            alone, in one pass.
        enabled: False for no guidance.
        scfg: fields of `SCFGConfig` that differ from its defaults. `foreground="auto"` is what the denoiser's class
            says; with a UNet it asks once per run, at the first step, whether the negative embedding is all zeros.
            `cell` is meant for autoencoders that shrink eight times: pass 2 with one that shrinks sixteen times, 1 with
            one that shrinks thirty-two times (LTX-Video).

    Attributes:
        regions: `Regions` of the last step, or None.
        stats: `Stats` of the run; reset at the first step that this guider sees of the next one.

    Raises:
        ValueError: a field of `scfg` is unknown, out of range or not for guiders (`tokens="words"`); or, when it is
            used, the denoiser is of a class whose attention is not known, or has none of the layers.

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
        if self.scfg_config.tokens != "all":
            raise ValueError("SCFGGuidance: a guider does not see the prompt's text; use tokens='all'")
        self._captures = CaptureSet()
        # A guider is asked for the guided prediction itself: what else the pipeline does with it is not its concern.
        self._context = CallContext(
            samples=0,
            guidance_scale=lambda _: self.guidance_scale,
            guidance_rescale=lambda: self.guidance_rescale,
            num_steps=lambda: self._num_inference_steps or 1,
        )
        self._pass: contextlib.ExitStack | None = None
        self._warned = False
        self._begin()

    def _begin(self) -> None:
        """Forget the run before."""
        self.regions: Regions | None = None
        self.stats = Stats()
        self._maps: dict[str, list[tuple[BlockInfo, BlockMaps]]] = {}
        self._finder = RegionFinder(self.scfg_config)
        self._mixer = mixer_of(self.scfg_config)
        self._guided_steps = 0
        self._negative: list[torch.Tensor] = []
        self._foreground: str | None = None  # decided at the first pass that is captured
        self._geometry: Geometry | None = None  # of the latents, once the denoiser was called with them
        self._view: View = Images()

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        # One of two guiders (Wan 2.2) may never see step 0.
        begins = self._step is None or step <= self._step or num_inference_steps != self._num_inference_steps
        super().set_state(step, num_inference_steps, timestep)
        if begins:
            self._close()
            self._begin()

    def prepare_inputs(self, data: Any) -> list[Any]:
        """As for plain guidance; until it is decided which half the foreground is read from, notes the embeddings."""
        if self._foreground is None and self._plan().regions == "find":
            pairs = [value for name, value in data.items() if name in ("prompt_embeds", "encoder_hidden_states")]
            self._negative = [pair[1] for pair in pairs if isinstance(pair, tuple) and pair[1] is not None]
        return super().prepare_inputs(data)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        self._close()
        planned = self._plan()
        if planned.reason is not None and self._mixer is None:
            return
        model = unwrap(denoiser)
        known = denoiser_of(model)
        if known is None or known.conditional_first:  # which takes both groups in one list, where a guider has one
            if planned.regions == "none":
                return  # needs no attention, and takes predictions as images
            readable = ", ".join(name for name, one in TRANSFORMERS.items() if not one.conditional_first)
            raise ValueError(
                f"SCFGGuidance: the denoiser is a {type(model).__name__}, whose attention is not known here; known are "
                f"UNet2DConditionModel, {readable}. Use ClassifierFreeGuidance there"
            )
        branch = "conditional" if self.is_conditional else "unconditional"
        self._view = known.view(model)
        capture = planned.regions == "find"
        if capture:
            self._foreground = self._foreground or self._half_of_foreground(known)
            capture = branch == "conditional" or self._foreground == "unconditional"
        if capture or self._geometry is None:
            self._surround(denoiser, model, known, branch, capture)

    def _surround(
        self, denoiser: torch.nn.Module, model: torch.nn.Module, known: Denoiser, branch: str, capture: bool
    ) -> None:
        """Have the next call of the denoiser tell the size of its latents and, with `capture`, leave its maps."""
        captured = None
        if capture:
            captured = HookedDenoiser(model, known, self._captures.choose(model, self.scfg_config))
            self.stats.layers = tuple(block.info.name for block in captured.blocks)
        layout = BatchLayout(1, self._foreground or "unconditional", branch)
        # Compiled in place, `forward` is traced; the compiled call is what can be surrounded.
        name = "forward" if denoiser.__dict__.get("_compiled_call_impl") is None else "_compiled_call_impl"
        forward = getattr(denoiser, name)
        shadowed = denoiser.__dict__.get(name)

        @functools.wraps(forward)
        def capturing(*args, **kwargs):
            try:
                size = None if self._geometry is None else (self._geometry.height, self._geometry.width)
                sample = argument(args, kwargs, 0, known.sample)
                self._geometry = known.geometry(model, sample, kwargs, size)
                with claimed(model):
                    if captured is None:
                        return forward(*args, **kwargs)
                    captured.put_in(layout, self._geometry)
                    try:
                        return forward(*args, **kwargs)
                    finally:
                        self._maps[branch] = captured.take_out()
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
        """Combine by region where this step has regions, else as plain guidance.

        Args:
            pred_cond, pred_uncond: of any layout that the denoiser has: images [B, C, H, W], packed patches
                [B, N, C p p], or videos [B, C, frames, H, W]. Packed rows beyond the picture that is drawn (reference
                images) get plain guidance.
        """
        maps, self._maps = self._maps, {}
        self.stats.weights.append(1.0 if pred_uncond is None else float(self.guidance_scale))
        self.stats.distances.append(None)
        self.stats.images = pred_cond.shape[0]
        config = self.scfg_config
        if zero_step(config, cast(int, self._step)):
            if pred_uncond is not None:
                self.stats.distances[-1] = distances(
                    pred_uncond, pred_cond, 0.0, None, -pred_uncond, 0.0, len(pred_cond)
                )
            return GuiderOutput(pred=torch.zeros_like(pred_cond), pred_cond=pred_cond, pred_uncond=pred_uncond)
        planned = self._plan()
        acts = planned.reason is None
        if pred_uncond is None or not (acts or config.combine != "cfg"):
            return super().forward(pred_cond, pred_uncond)
        weight, samples = float(self.guidance_scale), pred_cond.shape[0]
        view, geometry = self._view, self._geometry or Geometry(1, *pred_cond.shape[-2:])
        cond, uncond = view.open(pred_cond, geometry), view.open(pred_uncond, geometry)
        whole = geometry.frames > 1 or self._mixer is not None  # rescaled here: over a video, or what was mixed here
        guided: torch.Tensor | None = None
        rate: torch.Tensor | None = None
        rescale = 0.0 if whole else self.guidance_rescale
        if acts and config.rates == "pixels":
            guided, rate = guide_by_pixel(config, uncond, cond, weight, rescale=rescale)
        elif acts:
            step_maps = self._take_maps(maps, geometry) if planned.regions == "find" and maps else None
            if step_maps is None and self._finder.segments is None:
                raise RuntimeError("SCFGGuidance: no captured layer left a usable attention map")
            guided, rate = self._finder.guide(step_maps, uncond, cond, weight, "guided", rescale)
        moved: torch.Tensor | None = None
        if self._mixer is not None:
            mixed = self._mixer(uncond, cond, weight, rate, samples)
            rate, moved = mixed.rate, mixed.moved
            guided = rewritten(uncond, cond, moved, None)
        if acts and config.rates == "regions":
            token_index, foreground, _ = cast(Segments, self._finder.segments)
            self.regions = Regions(cast(int, self._step), token_index, foreground, cast(torch.Tensor, rate))
        self.stats.distances[-1] = distances(uncond, cond, weight, rate, moved, self.guidance_rescale, samples)
        others = pred_cond
        if cond.numel() < pred_cond.numel():
            others = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        pred = view.close(cast(torch.Tensor, guided), others, geometry)
        if self.guidance_rescale > 0.0 and whole:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        if acts:
            self._guided_steps += 1
            self.stats.steps_applied += 1
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _plan(self) -> StepPlan:
        """What this step does."""
        return plan(self._context, self.scfg_config, StepState(
            index=self._step or 0,
            count=self._num_inference_steps or 1,
            scale=float(self.guidance_scale) if self._is_cfg_enabled() else 1.0,
            guided_steps=self._guided_steps,
            has_regions=self._finder.segments is not None,
        ))  # fmt: skip

    def _half_of_foreground(self, known: Denoiser) -> str:
        """Which half the foreground is read from in this run; see `SCFGConfig.foreground`."""
        negative, self._negative = self._negative, []
        if self.scfg_config.foreground != "auto":
            return self.scfg_config.foreground
        if known.foreground is not None:
            return known.foreground
        zeroed = any(not bool(embeddings.any()) for embeddings in negative)
        return "conditional" if zeroed else "unconditional"

    def _take_maps(self, maps: dict[str, list[tuple[BlockInfo, BlockMaps]]], geometry: Geometry) -> StepMaps | None:
        pairs = zip(maps["conditional"], maps[cast(str, self._foreground)], strict=True)
        layers = [(info, BlockMaps(cond.tokens, deciding.start)) for (info, cond), (_, deciding) in pairs]
        step_maps, missing = self._finder.take(layers, (geometry.height, geometry.width))
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
