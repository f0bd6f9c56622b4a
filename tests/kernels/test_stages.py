"""From queries and keys to guided noise, every stage against the literal reference on the same inputs."""

import pytest
import torch
from scfg_kernels import attention_maps, complete, guide, segment
from scfg_kernels.testing import assert_as_accurate_as, assert_masks_agree

from lab.reference import official
from tests.kernels.cases import DTYPES, TOKENS, by_name, one_hot, random_qkv, reference_map, token_margin

HEADS, DIM = 8, 40
LATENTS = {"64x64": (64, 64), "65x97": (65, 97)}


@pytest.mark.parametrize("dtype", **by_name(DTYPES))
@pytest.mark.parametrize("latent_hw", **by_name(LATENTS))
def test_every_stage(rng, latent_hw, dtype):
    store = official.LiteralStore(latent_hw)
    sizes = [store.grid(4), store.grid(4), store.grid(8)]
    size = sizes[0]
    tokens, start, cond_maps, uncond_maps = [], [], [], []
    for h, w in sizes:
        n = h * w
        self_q, self_k, _ = random_qkv(rng, (2, HEADS, n, n, DIM), dtype, gain=1.5)
        cross_q, cross_k, _ = random_qkv(rng, (2, HEADS, n, TOKENS, DIM), dtype, gain=1.5)
        s, c = attention_maps(self_q, self_k, None, cross_q, cross_k, None)
        true_s = reference_map(self_q.double(), self_k.double())
        true_c = reference_map(cross_q.double(), cross_k.double())
        naive_s, naive_c = reference_map(self_q, self_k), reference_map(cross_q, cross_k)
        assert_as_accurate_as(s, naive_s, true_s, name="self map")
        assert_as_accurate_as(c, naive_c, true_c, name="cross map")

        layer_tokens, layer_start = complete(s, c, unconditional=1)
        truth = official.official_completion(true_s, true_c)
        naive = official.official_completion(naive_s, naive_c)
        assert_as_accurate_as(layer_tokens, naive[1:].mT, truth[1:].mT, name="completed tokens")
        assert_as_accurate_as(layer_start, naive[:1, :, 0], truth[:1, :, 0], name="completed start token")
        tokens.append(layer_tokens)
        start.append(layer_start)
        uncond_maps.append(truth[:1])
        cond_maps.append(truth[1:])

    ids, foreground = segment(tokens, start, sizes, size)
    scores = official.smoothed_normalised(cond_maps, sizes, size)
    margin, second = token_margin(scores)
    # The maps are fp32 whatever the inputs are, so the band is that of fp32 for half precision too.
    assert_masks_agree(
        ids, official.token_ids(official.token_masks(scores)), margin, max_crossings=2, runner_up=second, name="ids"
    )
    two = official.foreground_scores(uncond_maps, sizes, size)
    expected = official.foreground_mask(uncond_maps, sizes, size)[:, 0] > 0
    margin = (two[:, 0] - two[:, 1]).abs() / two.amax(1)
    assert_masks_agree(foreground, expected, margin, max_crossings=2, name="foreground")

    # The next stage is tested given equal masks.
    uncond = torch.randn(1, 4, *latent_hw, generator=rng).to(dtype)
    strength = torch.rand(latent_hw, generator=rng)
    cond = (uncond + strength * torch.randn(1, 4, *latent_hw, generator=rng)).to(dtype)
    result, rate = guide(uncond, cond, ids, foreground, 7.5, num_tokens=TOKENS)
    masks, inside = one_hot(ids, TOKENS), foreground[:, None].double()
    true_rate = official.rates(uncond.double(), cond.double(), masks, inside, 7.5)
    naive_rate = official.rates(uncond, cond, masks.float(), inside.float(), 7.5)
    assert_as_accurate_as(rate, naive_rate, true_rate, name="rate")
    truth = official.guided(uncond.double(), cond.double(), true_rate, 7.5)
    assert_as_accurate_as(result, official.guided(uncond, cond, naive_rate, 7.5), truth, name="guided")
