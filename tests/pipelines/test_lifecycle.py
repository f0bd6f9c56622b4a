"""Enable and disable are symmetric, idempotent, survive exceptions, and leave nothing behind."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0

import scfg_fast
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import SCFGConfig, UnsupportedPipelineError


@pytest.fixture()
def pipe() -> StableDiffusionPipeline:
    return tiny_sd_pipeline(sample_size=16)


def run(pipe, **kwargs) -> torch.Tensor:
    options = dict(num_inference_steps=3, guidance_scale=7.5, output_type="latent") | kwargs
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), **options).images


def state(pipe) -> tuple:
    """Everything that S-CFG touches during a call."""
    unet = pipe.unet
    return dict(unet.attn_processors), dict(unet._forward_hooks), dict(unet._forward_pre_hooks)


def assert_stock(pipe, before: tuple, plain: torch.Tensor) -> None:
    """The same processor objects, no hooks, and plain guidance's image, whether S-CFG is enabled or not."""
    after = state(pipe)
    assert all(after[0][name] is processor for name, processor in before[0].items()), "not the same processor objects"
    assert after[1:] == before[1:], "hooks were left behind"
    with scfg_fast.disabled(pipe):
        assert torch.equal(run(pipe), plain)


def test_between_calls_the_model_is_stock(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    assert_stock(pipe, before, plain)
    run(pipe)
    assert_stock(pipe, before, plain)


def test_disable_restores_everything(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    assert not torch.equal(run(pipe), plain)
    scfg_fast.disable(pipe)
    assert type(pipe) is StableDiffusionPipeline
    assert_stock(pipe, before, plain)
    scfg_fast.disable(pipe)
    assert_stock(pipe, before, plain)


def test_enable_twice_is_one_handle_with_the_new_settings(pipe) -> None:
    first = scfg_fast.enable(pipe)
    guided, cls = run(pipe), type(pipe)
    second = scfg_fast.enable(pipe, SCFGConfig(rate_max=1.0))
    assert second is first and type(pipe) is cls and second.config.rate_max == 1.0
    scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), guided)
    first.disable()
    assert type(pipe) is StableDiffusionPipeline


def test_disabled_context(pipe) -> None:
    plain = run(pipe)
    with scfg_fast.disabled(pipe):
        assert torch.equal(run(pipe), plain)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    with scfg_fast.disabled(pipe), scfg_fast.disabled(pipe):
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), guided)
    with pytest.raises(ZeroDivisionError), scfg_fast.disabled(pipe):
        raise ZeroDivisionError
    assert torch.equal(run(pipe), guided)


def fail(*args, **kwargs):
    raise ZeroDivisionError("from inside a step")


def test_an_exception_in_a_step_callback(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    with pytest.raises(ZeroDivisionError):
        run(pipe, callback_on_step_end=fail)
    assert_stock(pipe, before, plain)


def test_an_exception_in_on_regions(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe, on_regions=fail)
    with pytest.raises(ZeroDivisionError):
        run(pipe)
    assert_stock(pipe, before, plain)


def test_an_exception_inside_the_denoiser(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    hook = pipe.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(pipe)
    hook.remove()
    assert_stock(pipe, before, plain)


def test_wrong_arguments_give_the_pipelines_own_errors(pipe) -> None:
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    with pytest.raises(TypeError, match=r"unexpected keyword|got multiple values|positional"):
        pipe("a cat", "256", 256, 3, None, None, 7.5, None, 1, 0.0, *range(20))
    with pytest.raises(ValueError, match="divisible by 8"):
        run(pipe, height=100, width=100)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        pipe(num_inference_steps=1)
    assert_stock(pipe, before, plain)


def test_only_the_chosen_layers_are_replaced(pipe) -> None:
    """Inside an evaluation: six blocks captured, every other layer has the very processor object that the user had.
    Between evaluations every layer has it."""
    before = dict(pipe.unet.attn_processors)
    during: list[dict] = []
    between: list[dict] = []

    def look(pipe, step, timestep, tensors):
        between.append(dict(pipe.unet.attn_processors))
        return tensors

    handle = scfg_fast.enable(pipe)
    hook = pipe.unet.mid_block.register_forward_hook(lambda *_: during.append(dict(pipe.unet.attn_processors)))
    run(pipe, callback_on_step_end=look)
    hook.remove()
    replaced = {name for name in before if during[0][name] is not before[name]}
    assert len(replaced) == 12
    assert {name.rsplit(".attn", 1)[0] for name in replaced} == set(handle.stats.layers)
    assert during[0] == during[1] == during[2], "the processors must be the same objects in every step"
    assert between == [before] * 3


def test_the_maps_do_not_outlive_the_call(pipe) -> None:
    handle = scfg_fast.enable(pipe)
    run(pipe)
    for block in handle._captures[0].blocks:
        own, cross = block.captures
        assert own.held is None and cross.tokens is None and cross.start is None
        assert own.inner is None and cross.inner is None


def test_it_still_is_the_pipeline_it_was(pipe) -> None:
    stock = inspect.signature(StableDiffusionPipeline.__call__)
    scfg_fast.enable(pipe)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert (type(pipe).__name__, type(pipe).__module__) == (
        StableDiffusionPipeline.__name__, StableDiffusionPipeline.__module__,
    )  # fmt: skip
    ours = inspect.signature(type(pipe).__call__)
    assert [name for name in ours.parameters if name != "scfg_kwargs"] == list(stock.parameters)
    assert type(pipe).__call__.__doc__ == StableDiffusionPipeline.__call__.__doc__


@pytest.mark.any_rounding("only stock runs are compared")
def test_saving_an_enabled_pipeline_writes_a_clean_one(tmp_path) -> None:
    pipe = tiny_sd_pipeline(dtype=torch.float32)
    plain = run(pipe)
    pipe.save_pretrained(tmp_path / "stock")
    scfg_fast.enable(pipe)
    run(pipe)
    pipe.save_pretrained(tmp_path / "enabled")
    files = sorted(p.relative_to(tmp_path / "stock") for p in (tmp_path / "stock").rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "enabled") for p in (tmp_path / "enabled").rglob("*") if p.is_file()
    )
    for name in files:
        stock, enabled = (tmp_path / "stock" / name).read_bytes(), (tmp_path / "enabled" / name).read_bytes()
        if name.name == "model_index.json":
            assert json.loads(stock) == json.loads(enabled)
        else:
            assert stock == enabled, name
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "enabled", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), plain)


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_plain_pipelines(pipe, how) -> None:
    plain = run(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    other = how(pipe)
    assert type(other) is StableDiffusionPipeline
    assert torch.equal(run(other), plain)
    assert torch.equal(run(pipe), guided)


def test_from_pipe(pipe) -> None:
    plain = run(pipe)
    scfg_fast.enable(pipe)
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is StableDiffusionImg2ImgPipeline
    other = StableDiffusionPipeline.from_pipe(pipe, torch_dtype=pipe.dtype)
    assert torch.equal(run(other), plain)


def test_two_pipelines_that_share_a_denoiser(pipe) -> None:
    plain = run(pipe)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    assert torch.equal(run(other), plain)
    scfg_fast.enable(other, SCFGConfig(rate_max=1.0))
    assert torch.equal(run(pipe), guided)
    scfg_fast.disable(pipe)
    assert torch.equal(run(pipe), plain)
    assert not torch.equal(run(other), plain)


def test_a_call_inside_a_call_on_the_same_denoiser_is_refused(pipe) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    scfg_fast.enable(other)
    with pytest.raises(RuntimeError, match="inside another S-CFG call"):
        run(pipe, callback_on_step_end=lambda *args: run(other))
    assert_stock(pipe, before, plain)


def test_disjoint_layers_are_no_way_around_the_refusal(pipe) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    scfg_fast.enable(pipe, SCFGConfig(levels=[4]))
    scfg_fast.enable(other, SCFGConfig(levels=[8]))
    with pytest.raises(RuntimeError, match="inside another S-CFG call"):
        run(pipe, callback_on_step_end=lambda *args: run(other))


@pytest.mark.parametrize("other_is_enabled", [True, False], ids=["enabled", "plain"])
def test_threads_that_share_a_denoiser(pipe, other_is_enabled: bool) -> None:
    """The second thread gets the error, the first one its image, and the denoiser ends up stock."""
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain, before = run(pipe), state(pipe)
    scfg_fast.enable(pipe)
    expected = run(pipe)
    if other_is_enabled:
        scfg_fast.enable(other)
    errors: list[BaseException] = []

    def second() -> None:
        try:
            run(other)
        except BaseException as error:
            errors.append(error)

    def start_second(pipe, step, timestep, tensors):
        if step == 0:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return tensors

    assert torch.equal(run(pipe, callback_on_step_end=start_second), expected)
    assert len(errors) == 1 and "inside another S-CFG call" in str(errors[0])
    assert_stock(pipe, before, plain)
    assert torch.equal(run(pipe), expected)


def test_two_threads_that_start_at_once(pipe) -> None:
    """Whichever comes first wins, the other is refused, and nothing is left in the denoiser."""
    plain, before = run(pipe), state(pipe)
    others = [StableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in range(2)]
    for other in others:
        other.set_progress_bar_config(disable=True)
        scfg_fast.enable(other)
    barrier, results = threading.Barrier(2), []

    def work(other) -> None:
        barrier.wait()
        try:
            results.append(run(other))
        except RuntimeError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(r, torch.Tensor) or "inside another S-CFG call" in r for r in results)
    assert any(isinstance(r, torch.Tensor) for r in results)
    assert_stock(pipe, before, plain)
    assert isinstance(run(others[0]), torch.Tensor)


class WeightedProcessor(torch.nn.Module):
    """A processor with weights and a setting of its own, as those of IP-Adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.5))
        self.scale = 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return out * (1.0 + self.scale * (self.gain - 1.0))


def test_a_processor_with_weights_stays_part_of_the_model_during_the_call(pipe) -> None:
    """Offloading moves the parameters it finds; a scale callback finds processors by their class."""
    pipe.unet.set_attn_processor({name: WeightedProcessor() for name in pipe.unet.attn_processors})
    plain, before = run(pipe), state(pipe)
    names = set(pipe.unet.state_dict())
    inside: list[tuple[bool, int]] = []

    def look(pipe, step, timestep, tensors):
        found = [p for p in pipe.unet.attn_processors.values() if isinstance(p, WeightedProcessor)]
        inside.append((set(pipe.unet.state_dict()) == names, sum(p.scale == 1.0 for p in found)))
        return tensors

    scfg_fast.enable(pipe)
    guided = run(pipe, callback_on_step_end=look)
    assert inside == [(True, len(before[0]))] * 3
    assert not torch.equal(guided, plain)
    assert_stock(pipe, before, plain)
    assert set(pipe.unet.state_dict()) == names


def test_another_denoiser_in_the_same_pipeline(pipe) -> None:
    scfg_fast.enable(pipe)
    first = run(pipe)
    pipe.unet = tiny_sd_pipeline(seed=1, sample_size=16).unet
    second = run(pipe)
    assert not torch.equal(first, second)
    scfg_fast.disable(pipe)
    assert not torch.equal(run(pipe), second)


def test_nothing_keeps_the_pipeline_alive() -> None:
    import gc
    import weakref

    pipe = tiny_sd_pipeline(sample_size=16)
    handle = scfg_fast.enable(pipe)
    run(pipe)
    gone = [weakref.ref(pipe), weakref.ref(pipe.unet)]
    del pipe
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    handle.disable()


def test_other_pipelines_are_refused_with_the_reason() -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    report = scfg_fast.supports(pipe)
    assert not report.supported and "DDPMPipeline is not supported; this version supports" in str(report)
    with pytest.raises(UnsupportedPipelineError, match="DDPMPipeline is not supported; "):
        scfg_fast.enable(pipe)
    assert type(pipe) is DDPMPipeline


def test_a_distilled_unet_is_refused_with_the_reason(pipe) -> None:
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | {"time_cond_proj_dim": 32}
    pipe.unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(UnsupportedPipelineError, match="time_cond_proj_dim"):
        scfg_fast.enable(pipe)


class Engine(torch.nn.Module):
    """A denoiser that runs elsewhere, with the configuration of the UNet that it was made from."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.config, self.dtype, self.device, self.runs = unet.config, unet.dtype, unet.device, unet.forward

    def forward(self, *args, **kwargs):
        return self.runs(*args, **kwargs)


def test_a_replaced_denoiser_is_refused_with_the_reason(pipe) -> None:
    plain = run(pipe)
    pipe.unet = Engine(pipe.unet)
    with pytest.raises(UnsupportedPipelineError, match="the denoiser is a Engine"):
        scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), plain)


def test_supports_says_what_would_be_captured(pipe) -> None:
    report = scfg_fast.supports(pipe)
    assert report.supported and report.reasons == [] and len(report.layers) == 6
    assert "6 layers captured" in str(report)
    assert type(pipe) is StableDiffusionPipeline


def test_hooks_of_the_user_see_the_denoisers_own_output(pipe) -> None:
    """They were there first, they run first: two different halves, where S-CFG returns one guided prediction twice."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    run(pipe, num_inference_steps=1)
    scfg_fast.enable(pipe)
    run(pipe, num_inference_steps=1)
    hook.remove()
    raw, before_ours = seen
    torch.testing.assert_close(before_ours, raw, rtol=0, atol=1e-6)
    assert not torch.equal(*before_ours.chunk(2))


@pytest.mark.parametrize("config", [{"rate_max": 2.0}, "paper"])
def test_a_configuration_of_another_type_is_refused(pipe, config) -> None:
    with pytest.raises(TypeError, match="must be an SCFGConfig"):
        scfg_fast.enable(pipe, config)
    handle = scfg_fast.enable(pipe)
    with pytest.raises(TypeError, match="must be an SCFGConfig"):
        handle.config = config


def test_a_pickle_loads_where_this_package_is_not_installed(pipe) -> None:
    scfg_fast.enable(pipe)
    assert b"scfg_fast" not in pickle.dumps(pipe)


@pytest.mark.parametrize("name, reason", [
    ("StableDiffusionInstructPix2PixPipeline", "three groups of samples"), ("FluxFillPipeline", "distilled"),
    ("LatentConsistencyModelPipeline", "is distilled"), ("Kandinsky3Pipeline", "is not supported; this version"),
    ("OnnxStableDiffusionPipeline", "outside of torch"),
])  # fmt: skip
def test_pipelines_that_people_ask_about_are_refused_with_the_reason(name: str, reason: str) -> None:
    other = object.__new__(type(name, (DDPMPipeline,), {"__module__": "diffusers.pipelines"}))
    report = scfg_fast.supports(other)
    assert not report.supported and name in str(report) and reason in str(report)
    with pytest.raises(UnsupportedPipelineError, match="this version supports Stable Diffusion"):
        scfg_fast.enable(other)
