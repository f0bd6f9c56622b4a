"""The networks of the bundled model and the losses they are trained with.

Attention sits at 1/4 and 1/8 of the latent side (16 x 16 and 8 x 8 for 256-pixel pictures), where Stable Diffusion has
the layers that semantic-aware guidance reads.

Losses, with a = alpha_bar_t, x_t = sqrt(a) z + sqrt(1 - a) e and v = sqrt(a) e - sqrt(1 - a) z::

    diffusion = |v_hat - v|^2, every t alike
    token     = sqrt(a) * mean over named tokens of (1 - share of the token's attention inside its mask)^2

Large t must keep its full weight. A background colour can be read off 4096 noisy latents until a is about 0.001, so
only the last steps make the network ask the caption for it. Min-SNR weights, min(snr, 5) / (snr + 1), scale just those
steps down to nothing: after 16 k pictures trained with them, landscapes were right and all colours still random.

The token loss ties nouns, colour words and the background word to the pixels they describe. Regions read from this
model's attention are therefore *supervised*; how well they fit says nothing about models trained without it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.tokenizer import MAX_TOKENS

TEXT_WIDTH = 128


def build_unet(channels: tuple[int, int, int, int] = (32, 64, 96, 160)) -> UNet2DConditionModel:
    """A fresh denoiser for 64 x 64 x 4 latents; 7.3 M parameters with the default channels."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads for this class
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 4) -> CLIPTextModel:
    """A fresh text encoder, 128 wide, for prompts of 24 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule that the model is trained with and shipped with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # no effect with trailing spacing; StableDiffusionPipeline warns about 0
    )


class CrossAttentionRecorder:
    """Attention processor that keeps the head-averaged cross-attention maps of one forward pass, with gradients.

    ``maps`` gets one float32 [B, H * W, tokens] per cross-attention layer; call :meth:`clear` before each pass.
    """

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget the maps of the last pass."""
        self.maps.clear()

    def install(self, unet: UNet2DConditionModel) -> None:
        """Use this processor for cross-attention and the stock one for self-attention."""
        processors: dict[str, Any] = {
            name: self if ".attn2." in name else AttnProcessor2_0() for name in unet.attn_processors
        }
        unet.set_attn_processor(processors)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        weights = attn.get_attention_scores(query, key, attention_mask)
        self.maps.append(weights.unflatten(0, (-1, attn.heads)).mean(1))
        out = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](out))


def token_loss(
    maps: list[torch.Tensor], masks: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """How much of the named tokens' attention lies outside their masks, squared.

    Args:
        maps: per layer [B, L * L, tokens], nonnegative.
        masks: [B, S, C, C] coverage in [0, 1], with C a multiple of every L.
        slots: int64 [B, S, W], token positions that name each mask, -1 where there is none.
        weight: [B], weight of each row.

    Returns:
        Scalar in [0, 1]: the weighted mean over layers and named tokens; zero if nothing is named.
    """
    rows, masks_per_row, words = slots.shape
    index = slots.clamp_min(0).view(rows, 1, -1)
    counted = (slots >= 0).view(rows, -1) * weight[:, None]
    total = counted.sum().clamp_min(1e-6)
    loss = maps[0].new_zeros(())
    for attention in maps:
        side = round(attention.shape[1] ** 0.5)
        inside = F.adaptive_avg_pool2d(masks, side).flatten(2)
        inside = inside / inside.amax(-1, keepdim=True).clamp_min(1e-4)
        chosen = attention.gather(2, index.expand(-1, attention.shape[1], -1))
        chosen = (chosen / chosen.sum(1, keepdim=True).clamp_min(1e-8)).transpose(1, 2)
        chosen = chosen.view(rows, masks_per_row, words, -1)
        share = (chosen * inside[:, :, None]).sum(-1).view(rows, -1)
        loss = loss + ((1.0 - share).square() * counted).sum() / total
    return loss / len(maps)


def diffusion_loss(
    prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of a v-prediction, a scalar.

    Args:
        prediction: [B, 4, H, W], the network's output.
        latents, noise: [B, 4, H, W], what was mixed.
        alphas: [B], alpha_bar of each row's step.
    """
    a = alphas.view(-1, 1, 1, 1)
    return (prediction - (a.sqrt() * noise - (1.0 - a).sqrt() * latents)).square().mean()
