"""Real pipelines with tiny transformers, random weights and given prompt embeddings; latents out.

They compute in fp64 unless another dtype is asked for, for the reason that `lab.tiny.unets` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch.utils._pytree import tree_map

from lab.reference.transformers import Layout
from lab.tiny.unets import silent

BATCH, STEPS = 3, 3


@dataclass(frozen=True)
class Tiny:
    """A pipeline to test.

    Attributes:
        build: makes it in fp32.
        arguments: makes the arguments of a call for some of the three prompts, in fp32.
        layout: for the reference.
        layers: attention modules of a block, in the order in which they run.
        text_tokens: text keys.
    """

    build: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]
    layout: Layout
    layers: tuple[str, ...]
    text_tokens: int

    def pipeline(self, dtype: torch.dtype = torch.float64) -> Any:
        """The pipeline, its models in `dtype`."""
        return silent(self.build(), dtype)

    def call(self, picks: list[int], dtype: torch.dtype = torch.float64, **others: Any) -> dict[str, Any]:
        """Arguments of a call for some of the three prompts, floating-point tensors in `dtype`."""
        return tree_map(
            lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
            self.arguments(picks, **others),
        )


def sharpened(model: torch.nn.Module, gain: float) -> Any:
    """Query and key weights times `gain`: fresh weights attend almost uniformly; in evaluation mode."""
    with torch.no_grad():
        for name, module in model.named_modules():
            sharpens = name.rsplit(".", 1)[-1] in ("to_q", "to_k", "add_k_proj", "norm_k", "norm_q", "norm_added_k")
            if sharpens and getattr(module, "weight", None) is not None:
                module.weight *= gain
    return model.eval()


def made(cls: str, gain: float = 2.5, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return sharpened(getattr(diffusers, cls)(**options), gain)


def assembled(cls: str, **components: Any) -> Any:
    return getattr(diffusers, cls)(**components)


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    """[3, ...] random numbers."""
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))


def lengths_mask(lengths: tuple[int, ...], tokens: int) -> torch.Tensor:
    """[3, T] int64: 1 up to each length."""
    return (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()


def arguments(picks: list[int], tensors: dict[str, torch.Tensor], **others: Any) -> dict[str, Any]:
    """A call for some of the prompts, each with noise of its own."""
    call: dict[str, Any] = {name: tensor[picks] for name, tensor in tensors.items()}
    call |= dict(num_inference_steps=STEPS, output_type="latent", return_dict=False)
    call["generator"] = [torch.Generator().manual_seed(40 + pick) for pick in picks]
    return call | others


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def ddim() -> Any:
    return diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def packed_images(frames: int, height: int, width: int, patch: int) -> dict[str, Callable]:
    """[B, frames h w, C p p] as images, by reshaping alone."""

    def images(x: torch.Tensor) -> torch.Tensor:
        batch, _, channels = x.shape
        x = x.reshape(batch, frames, height, width, channels // patch**2, patch, patch)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch * frames, channels // patch**2, height * patch, width * patch)

    def back(x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, frames, x.shape[1], height, patch, width, patch).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(prediction.shape)

    return dict(images=images, back=back)


VIDEOS: dict[str, Callable] = dict(
    images=lambda x: x.permute(0, 2, 1, 3, 4).reshape(-1, x.shape[1], *x.shape[3:]),
    back=lambda x, p: x.reshape(p.shape[0], p.shape[2], p.shape[1], *p.shape[3:]).permute(0, 2, 1, 3, 4),
)
FIRST_FOUR: dict[str, Callable] = dict(images=lambda x: x[:, :4], back=lambda x, p: torch.cat([x, p[:, 4:]], 1))
HEIGHT, WIDTH = 128, 192  # latents of 16 x 24: cells of 4 x 6


def sd3(channels: int = 4) -> Tiny:
    text, tokens = embeddings(1, 13, 32), embeddings(2, 13, 32)

    def pipeline() -> Any:
        transformer = made(
            "SD3Transformer2DModel", sample_size=32, patch_size=2, in_channels=channels, out_channels=channels,
            num_layers=5,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=16, pos_embed_max_size=32, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
        none = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        )
        return assembled("StableDiffusion3Pipeline", transformer=transformer, scheduler=flow(), **none)

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=text, negative_prompt_embeds=tokens, pooled_prompt_embeds=embeddings(3, 16),
            negative_pooled_prompt_embeds=embeddings(4, 16),
        )  # fmt: skip
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH, guidance_scale=5.0) | others)

    return Tiny(pipeline, call, Layout((1, 8, 12), 2, text_first=False), ("attn",), 13)


def auraflow() -> Tiny:
    """Eight learned tokens come before those of the text."""

    def pipeline() -> Any:
        transformer = made(
            "AuraFlowTransformer2DModel", sample_size=32, patch_size=2, in_channels=4, out_channels=4,
            num_mmdit_layers=5, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=256,
        )  # fmt: skip
        with torch.no_grad():  # fresh gates are nearly closed: the text would change nothing
            for block in (*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks):
                block.norm1.linear.weight *= 15.0
            for block in transformer.joint_transformer_blocks:
                block.norm1_context.linear.weight *= 15.0
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        return assembled("AuraFlowPipeline", transformer=transformer, scheduler=flow(), **none)

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(5, 13, 24), negative_prompt_embeds=embeddings(6, 13, 24),
            prompt_attention_mask=lengths_mask((9, 6, 13), 13),
            negative_prompt_attention_mask=lengths_mask((1, 1, 1), 13),
        )  # fmt: skip
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH, guidance_scale=4.0) | others)

    layout = Layout((1, 8, 12), 2, start=(20, 20, 20), foreground="conditional")
    return Tiny(pipeline, call, layout, ("attn",), 8 + 13)


def pixart() -> Tiny:
    lengths = (9, 6, 11)

    def pipeline() -> Any:
        transformer = made(
            "PixArtTransformer2DModel", gain=6.0, sample_size=16, patch_size=2, in_channels=4, out_channels=8,
            num_layers=5, attention_head_dim=8, num_attention_heads=4, cross_attention_dim=32, caption_channels=24,
            use_additional_conditions=False, norm_num_groups=4,
        )  # fmt: skip
        return assembled(
            "PixArtSigmaPipeline",
            transformer=transformer,
            scheduler=ddim(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 11, 24), prompt_attention_mask=lengths_mask(lengths, 11),
            negative_prompt_embeds=embeddings(2, 11, 24), negative_prompt_attention_mask=lengths_mask((1, 1, 4), 11),
        )  # fmt: skip
        extra = dict(height=HEIGHT, width=WIDTH, guidance_scale=4.5, use_resolution_binning=False, negative_prompt=None)
        return arguments(picks, tensors, **extra | others)

    layout = Layout((1, 8, 12), 2, joint=False, start=[n - 1 for n in lengths], foreground="conditional", **FIRST_FOUR)
    return Tiny(pipeline, call, layout, ("attn1", "attn2"), 11)


def hunyuan() -> Tiny:
    def pipeline() -> Any:
        transformer = made(
            "HunyuanDiT2DModel", sample_size=16, patch_size=2, in_channels=4, num_layers=6, hidden_size=32,
            attention_head_dim=8, num_attention_heads=4, cross_attention_dim=24, cross_attention_dim_t5=16,
            pooled_projection_dim=16, text_len=7, text_len_t5=6, mlp_ratio=2.0, activation_fn="gelu-approximate",
            learn_sigma=True, norm_type="layer_norm",
        )  # fmt: skip
        none = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor")
        )
        return assembled(
            "HunyuanDiTPipeline", transformer=transformer, scheduler=ddim(), requires_safety_checker=False, **none
        )

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 7, 24), prompt_attention_mask=lengths_mask((5, 4, 7), 7),
            prompt_embeds_2=embeddings(2, 6, 16), prompt_attention_mask_2=lengths_mask((3, 6, 4), 6),
            negative_prompt_embeds=embeddings(3, 7, 24), negative_prompt_attention_mask=lengths_mask((2, 2, 3), 7),
            negative_prompt_embeds_2=embeddings(4, 6, 16), negative_prompt_attention_mask_2=lengths_mask((1, 1, 2), 6),
        )  # fmt: skip
        extra = dict(height=HEIGHT, width=WIDTH, guidance_scale=5.0, use_resolution_binning=False)
        return arguments(picks, tensors, **extra | others)

    return Tiny(pipeline, call, Layout((1, 8, 12), 2, joint=False), ("attn1", "attn2"), 13)


def sana() -> Tiny:
    lengths = (9, 6, 11)

    def pipeline() -> Any:
        transformer = made(
            "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
            num_layers=5, num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32,
            caption_channels=24, sample_size=32, patch_size=1,
        )  # fmt: skip
        return assembled(
            "SanaPipeline", transformer=transformer, scheduler=flow(), vae=None, text_encoder=None, tokenizer=None
        )

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 11, 24), prompt_attention_mask=lengths_mask(lengths, 11),
            negative_prompt_embeds=embeddings(2, 11, 24), negative_prompt_attention_mask=lengths_mask((2, 2, 4), 11),
        )  # fmt: skip
        extra = dict(height=256, width=320, guidance_scale=4.5, use_resolution_binning=False, negative_prompt=None)
        return arguments(picks, tensors, **extra | others)

    layout = Layout((1, 8, 10), 1, joint=False, foreground="conditional", completes=False)
    return Tiny(pipeline, call, layout, ("attn2",), 11)


def ltx() -> Tiny:
    lengths = (9, 6, 11)

    def pipeline() -> Any:
        transformer = made(
            "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
            cross_attention_dim=32, num_layers=5, caption_channels=24,
        )  # fmt: skip
        return assembled(
            "LTXPipeline", transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=16, max_image_seq_len=64
            ), vae=None, text_encoder=None, tokenizer=None,
        )  # fmt: skip

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 11, 24), prompt_attention_mask=lengths_mask(lengths, 11),
            negative_prompt_embeds=embeddings(2, 11, 24), negative_prompt_attention_mask=lengths_mask((1, 1, 4), 11),
        )  # fmt: skip
        extra = dict(height=192, width=256, num_frames=9, guidance_scale=3.0)
        return arguments(picks, tensors, **extra | others)

    layout = Layout(
        (2, 6, 8), 1, joint=False, start=[n - 1 for n in lengths], foreground="conditional",
        **packed_images(2, 6, 8, 1),
    )  # fmt: skip
    return Tiny(pipeline, call, layout, ("attn1", "attn2"), 11)


def flux(chroma: bool = False) -> Tiny:
    lengths = (9, 6, 11)

    def pipeline() -> Any:
        options = dict(
            patch_size=1, in_channels=16, num_layers=5, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        if chroma:
            transformer = made(
                "ChromaTransformer2DModel", **options, approximator_num_channels=8, approximator_hidden_dim=16,
                approximator_layers=1,
            )  # fmt: skip
            return assembled("ChromaPipeline", transformer=transformer, scheduler=flow(), **none)
        transformer = made("FluxTransformer2DModel", **options, pooled_projection_dim=16)
        none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        return assembled("FluxPipeline", transformer=transformer, scheduler=flow(), **none)

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(prompt_embeds=embeddings(1, 11, 24), negative_prompt_embeds=embeddings(2, 11, 24))
        if chroma:
            tensors |= dict(
                prompt_attention_mask=lengths_mask(lengths, 11).bool(),
                negative_prompt_attention_mask=lengths_mask((2, 3, 4), 11).bool(),
            )
            extra: dict[str, Any] = dict(guidance_scale=4.0)
        else:
            tensors |= dict(pooled_prompt_embeds=embeddings(3, 16), negative_pooled_prompt_embeds=embeddings(4, 16))
            extra = dict(true_cfg_scale=4.0)
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH) | extra | others)

    start = [n - 1 for n in lengths] if chroma else [10] * BATCH
    layout = Layout((1, 8, 12), 2, start=start, foreground="conditional", two_pass=True, **packed_images(1, 8, 12, 2))
    return Tiny(pipeline, call, layout, ("attn",), 11)


def qwen() -> Tiny:
    lengths = (9, 6, 11)

    def pipeline() -> Any:
        transformer = made(
            "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=5,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        return assembled(
            "QwenImagePipeline", transformer=transformer, scheduler=flow(), vae=None, text_encoder=None, tokenizer=None
        )

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 11, 24), prompt_embeds_mask=lengths_mask(lengths, 11).bool(),
            negative_prompt_embeds=embeddings(2, 11, 24),
            negative_prompt_embeds_mask=lengths_mask((2, 3, 4), 11).bool(),
        )  # fmt: skip
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH, true_cfg_scale=4.0) | others)

    layout = Layout(
        (1, 8, 12), 2, start=[n - 1 for n in lengths], foreground="conditional", two_pass=True,
        **packed_images(1, 8, 12, 2),
    )  # fmt: skip
    return Tiny(pipeline, call, layout, ("attn",), 11)


def cogview4() -> Tiny:
    def pipeline() -> Any:
        transformer = made(
            "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=5,
            attention_head_dim=16, num_attention_heads=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
            pos_embed_max_size=32, sample_size=32, rope_axes_dim=(16, 16),
        )  # fmt: skip
        return assembled(
            "CogView4Pipeline", transformer=transformer, vae=None, text_encoder=None, tokenizer=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
        )  # fmt: skip

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(prompt_embeds=embeddings(1, 11, 24), negative_prompt_embeds=embeddings(2, 11, 24))
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH, guidance_scale=4.0) | others)

    return Tiny(pipeline, call, Layout((1, 8, 12), 2, two_pass=True), ("attn1",), 11)


def wan(two: bool = False) -> Tiny:
    def pipeline() -> Any:
        options: dict[str, Any] = dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=24, freq_dim=16, ffn_dim=32, num_layers=5, rope_max_seq_len=32,
        )  # fmt: skip
        return assembled(
            "WanPipeline", transformer=made("WanTransformer3DModel", **options), vae=None, text_encoder=None,
            tokenizer=None, transformer_2=made("WanTransformer3DModel", **options) if two else None,
            boundary_ratio=0.6 if two else None,
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        )  # fmt: skip

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(prompt_embeds=embeddings(1, 11, 24), negative_prompt_embeds=embeddings(2, 11, 24))
        extra: dict[str, Any] = dict(height=128, width=192, num_frames=5, guidance_scale=4.0)
        if two:
            extra["guidance_scale_2"] = 3.0
        return arguments(picks, tensors, **extra | others)

    layout = Layout((2, 8, 12), 2, joint=False, start=[10] * BATCH, foreground="conditional", two_pass=True, **VIDEOS)
    return Tiny(pipeline, call, layout, ("attn1", "attn2"), 11)


def lumina2() -> Tiny:
    def pipeline() -> Any:
        transformer = made(
            "Lumina2Transformer2DModel", sample_size=32, patch_size=2, in_channels=4, hidden_size=32, num_layers=5,
            num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2),
            axes_lens=(64, 64, 64), cap_feat_dim=24,
        )  # fmt: skip
        return assembled(
            "Lumina2Pipeline", transformer=transformer, vae=None, text_encoder=None, tokenizer=None, scheduler=flow()
        )

    def call(picks: list[int], lengths: tuple[int, ...] = (9, 9, 9), **others: Any) -> dict[str, Any]:
        tensors = dict(
            prompt_embeds=embeddings(1, 11, 24), prompt_attention_mask=lengths_mask(lengths, 11),
            negative_prompt_embeds=embeddings(2, 11, 24), negative_prompt_attention_mask=lengths_mask((2, 2, 2), 11),
        )  # fmt: skip
        extra = dict(height=HEIGHT, width=WIDTH, guidance_scale=4.0, cfg_normalization=False)
        return arguments(picks, tensors, **extra | others)

    layout = Layout((1, 8, 12), 2, foreground="conditional", two_pass=True)
    return Tiny(pipeline, call, layout, ("attn",), 9)


def z_image() -> Tiny:
    texts = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (9, 31, 17)]
    others_ = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 6)]

    def pipeline() -> Any:
        transformer = made(
            "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=5, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
        )  # fmt: skip
        with torch.no_grad():  # padding tokens are left uninitialised, for a checkpoint to fill
            transformer.x_pad_token.normal_(generator=torch.Generator().manual_seed(7))
            transformer.cap_pad_token.normal_(generator=torch.Generator().manual_seed(8))
        return assembled(
            "ZImagePipeline", transformer=transformer, vae=None, text_encoder=None, tokenizer=None, scheduler=flow()
        )

    def call(picks: list[int], captions: list[torch.Tensor] | None = None, **others: Any) -> dict[str, Any]:
        lists = dict(
            prompt_embeds=[(captions or texts)[pick] for pick in picks],
            negative_prompt_embeds=[others_[pick] for pick in picks],
        )
        extra = dict(height=144, width=208, guidance_scale=3.0)
        return arguments(picks, {}, **lists | extra | others)

    return Tiny(pipeline, call, Layout((1, 9, 13), 2, text_first=False, conditional_first=True), ("attention",), 32)


def flux2() -> Tiny:
    """FLUX.2 klein base. Its autoencoder is there for the reference image alone."""

    def pipeline() -> Any:
        transformer = made(
            "Flux2Transformer2DModel", in_channels=16, num_layers=5, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16, mlp_ratio=2.0,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        )  # fmt: skip
        vae = made("AutoencoderKLFlux2", block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4)
        return assembled(
            "Flux2KleinPipeline", transformer=transformer, scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None
        )

    def call(picks: list[int], **others: Any) -> dict[str, Any]:
        tensors = dict(prompt_embeds=embeddings(1, 11, 24), negative_prompt_embeds=embeddings(2, 11, 24))
        return arguments(picks, tensors, **dict(height=HEIGHT, width=WIDTH, guidance_scale=4.0) | others)

    return Tiny(pipeline, call, Layout((1, 8, 12), 2, two_pass=True, **packed_images(1, 8, 12, 2)), ("attn",), 11)


TINY: dict[str, Tiny] = {
    "sd3": sd3(),
    "auraflow": auraflow(),
    "pixart": pixart(),
    "hunyuan": hunyuan(),
    "sana": sana(),
    "ltx": ltx(),
    "flux": flux(),
    "flux2": flux2(),
    "chroma": flux(chroma=True),
    "qwen": qwen(),
    "cogview4": cogview4(),
    "lumina2": lumina2(),
    "z-image": z_image(),
    "wan": wan(),
    "wan2.2": wan(two=True),
}
