"""How a call is read: what users put around a pipeline, for every class that is supported.

Subclasses that hand their call on, wrappers of other libraries on the class, what each class reads its scale from.
"""

from __future__ import annotations

import ast
import gc
import inspect
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

import scfg_fast
from lab.tiny.deepfloyd import STAGE_ONE, STAGE_TWO, if_arguments, tiny_if_pipeline
from lab.tiny.transformers import TINY
from lab.tiny.unets import tiny_sd_pipeline
from scfg_fast import SCFGConfig, SCFGError, SCFGWarning, UnsupportedPipelineError
from scfg_fast.guidance import WeightSchedule
from scfg_fast.pipelines.families import ARGUMENT_SCALE, FAMILIES, argument_scale, scale_of
from scfg_fast.pipelines.interception import ancestry, intercept, original_of, release
from tests.pipelines.test_families import CASES, arguments_of, build

pytestmark = pytest.mark.filterwarnings("ignore:scfg_fast. this pipeline sets every guided token back")

EVERY_CLASS = [name for family in FAMILIES for name in family.pipelines]
CALLS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    **{name: (lambda n=name: build(n), lambda n=name: arguments_of(n, [0], num_inference_steps=2)) for name in CASES},
    **{
        name: (lambda n=name: tiny_if_pipeline(n), lambda n=name: if_arguments(n, [0], num_inference_steps=2))
        for name in (*STAGE_ONE, *STAGE_TWO)
    },
    **{name: (tiny.pipeline, lambda t=tiny: t.call([0], num_inference_steps=2)) for name, tiny in TINY.items()},
}  # fmt: skip


class Case:
    """A stock pipeline and the arguments of a call."""

    def __init__(self, name: str) -> None:
        make, self.arguments = CALLS[name]
        self.pipe = make()
        self.stock = type(self.pipe)

    def run(self, **overrides: Any) -> torch.Tensor:
        result = self.pipe(**(self.arguments() | overrides))[0]
        return result if isinstance(result, torch.Tensor) else torch.stack(list(result))


@pytest.fixture(scope="module", params=CALLS)
def case(request: pytest.FixtureRequest):
    case = Case(request.param)
    yield case
    assert type(case.pipe) is case.stock


@pytest.fixture()
def pipe() -> StableDiffusionPipeline:
    return tiny_sd_pipeline(sample_size=16)


def run(pipe, prompt: Any = "a red cat", **kwargs: Any) -> torch.Tensor:
    options = dict(num_inference_steps=3, guidance_scale=7.5, output_type="latent") | kwargs
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options)[0]


def everything(stock: type) -> type:
    class Studio(stock):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    return Studio


def the_rest(stock: type) -> type:
    class Short(stock):
        def __call__(self, prompt=None, **kwargs):
            return super().__call__(prompt=prompt, **kwargs)

    return Short


def by_name(stock: type) -> type:
    class Named(stock):
        def __call__(self, prompt=None, **kwargs):
            return stock.__call__(self, prompt=prompt, **kwargs)

    return Named


@pytest.mark.parametrize("derive", [everything, the_rest, by_name])
def test_a_subclass_that_hands_its_call_on_is_guided_as_the_stock_class(case: Case, derive: Any) -> None:
    handle = scfg_fast.enable(case.pipe)
    guided, steps = case.run(), handle.stats.steps_applied
    scfg_fast.disable(case.pipe)
    assert steps >= 1
    case.pipe.__class__ = derive(case.stock)
    try:
        handle = scfg_fast.enable(case.pipe)
        assert torch.equal(case.run(), guided)
        assert handle.stats.steps_applied == steps and not handle.stats.steps_skipped
        scfg_fast.disable(case.pipe)
        assert type(case.pipe).__mro__[1] is case.stock
    finally:
        case.pipe.__class__ = case.stock


def test_the_scale_is_the_one_that_the_guidance_line_reads(case: Case) -> None:
    """With rates of 1, what a callback does to the scale has the effect that it has in stock."""
    if "callback_on_step_end" not in inspect.signature(case.stock.__call__).parameters:
        assert scale_of(case.pipe) is argument_scale, "no callback can change anything else"
        return

    def more(pipe: Any, index: int, timestep: Any, tensors: dict) -> dict:
        pipe._guidance_scale = 2.0 + float(getattr(pipe, "_guidance_scale", None) or 5.0)
        return tensors

    stock = case.run(callback_on_step_end=more)
    scfg_fast.enable(case.pipe, SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None))
    ours = case.run(callback_on_step_end=more)
    scfg_fast.disable(case.pipe)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))


@pytest.mark.parametrize("name", [name for name in EVERY_CLASS if name in CASES])
def test_the_table_of_scales_is_what_the_source_says(name: str) -> None:
    cls = getattr(diffusers, name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.__call__))))
    factors = {
        ast.unparse(product.left)
        for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        for product in [node.right] if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)
        if isinstance(product.right, ast.BinOp) and isinstance(product.right.op, ast.Sub)
    }  # fmt: skip
    reads = {factor for factor in factors if factor.endswith("guidance_scale")}
    if "PAG" in name and not reads:  # its line stands in a method, which takes the scale
        reads = {
            ast.unparse(node.args[3]) for node in ast.walk(tree) if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "self._apply_perturbed_attention_guidance" and len(node.args) > 3
        }  # fmt: skip
    assert reads == {"guidance_scale" if name in ARGUMENT_SCALE else "self.guidance_scale"}
    expected = argument_scale if name in ARGUMENT_SCALE else next(f for f in FAMILIES if name in f.pipelines).scale
    assert scale_of(object.__new__(cls)) is expected


# What is put on and taken off a class, in every order of ours and theirs.


def wrapped(call: Callable, seen: list) -> Callable:
    def wrapper(self, *args, **kwargs):
        seen.append(1)
        return call(self, *args, **kwargs)

    return wrapper


@pytest.mark.parametrize("name", EVERY_CLASS)
@pytest.mark.parametrize("third", ["off", "disable"])
@pytest.mark.parametrize("order", ["theirs, ours", "ours, theirs"])
def test_wrappers_of_others_on_the_class(name: str, order: str, third: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of the stock class stands for the whole pipeline: what matters is who is called, in which order."""
    stock, seen, log = getattr(diffusers, name), [], []

    def call(self, prompt=None, guidance_scale=5.0, **kwargs):
        log.append("stock")
        return prompt

    def note(what: str) -> Callable:
        def through(pipe, proceed, args, kwargs):
            log.append(what)
            kwargs.pop("scfg_kwargs", None)
            return proceed(*args, **kwargs)

        return through

    monkeypatch.setattr(stock, "__call__", call)
    pipe, other = object.__new__(stock), object.__new__(stock)
    first, second = order.split(", ")

    def theirs() -> None:
        type(pipe).__call__ = wrapped(type(pipe).__call__, seen)

    def off() -> None:
        type(pipe).__call__ = call

    actions = {
        "theirs": theirs, "off": off, "disable": lambda: release(pipe),
        "ours": lambda: intercept(pipe, stock, note("outer"), note("inner")),
    }  # fmt: skip
    actions[first]()
    actions[second]()
    assert pipe("a cat", scfg_kwargs=None) == "a cat"
    assert log == ["outer", "inner", "stock"] and seen == [1]
    assert other("a cat") == "a cat" and seen == [1, 1] and "outer" not in log[3:]
    log.clear()
    actions[third]()
    assert pipe("a cat") == "a cat"
    assert log == (["stock"] if third == "disable" else ["outer", "inner", "stock"])
    assert seen == [1, 1, 1] if third == "disable" else seen == [1, 1]
    release(pipe)
    assert type(pipe) is stock and "scfg_kwargs" not in inspect.signature(stock.__call__).parameters


@pytest.mark.parametrize("name", EVERY_CLASS)
def test_the_class_of_an_enabled_object_passes_for_its_own(name: str) -> None:
    stock = getattr(diffusers, name)

    class Studio(stock):
        def __init__(self) -> None:
            pass

    for own in (stock, Studio):
        pipe = object.__new__(own)
        intercept(pipe, stock, print, print)
        cls = type(pipe)
        assert (
            original_of(cls) is own
            and [c for c in ancestry(cls) if c is own or c is stock] == ancestry(own)[: 1 + (own is Studio)]
        )
        assert (cls.__name__, cls.__qualname__, cls.__module__) == (own.__name__, own.__qualname__, own.__module__)
        assert isinstance(object.__new__(own), cls) and issubclass(own, cls) and cls.__call__ is own.__call__
        cls.mark = 1
        assert vars(own)["mark"] == 1
        del cls.mark
        assert "mark" not in vars(own)
        derived = type("Derived", (cls,), {})
        derived.mark = 2
        assert "mark" not in vars(own) and original_of(derived) is None and not isinstance(object.__new__(own), derived)
        release(pipe)
        assert type(pipe) is own
    intercept(pipe := object.__new__(Studio), stock, print, print)
    assert type(type(pipe)()) is Studio
    release(pipe)


@pytest.mark.any_rounding("the same computation again, bit by bit")
def test_pipelines_made_through_the_class_of_an_enabled_one_are_stock(tmp_path) -> None:
    pipe = tiny_sd_pipeline(dtype=torch.float32)  # the dtype that a pipeline is loaded in
    plain = run(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    pipe.save_pretrained(tmp_path)
    for make in (
        lambda: type(pipe)(**pipe.components, requires_safety_checker=False),
        lambda: type(pipe).from_pipe(pipe),
        lambda: type(pipe).from_pretrained(tmp_path, local_files_only=True),
    ):
        other = make()
        other.set_progress_bar_config(disable=True)
        assert type(other) is StableDiffusionPipeline and torch.equal(run(other), plain)
        scfg_fast.enable(other)
        assert torch.equal(run(other), guided)
        scfg_fast.disable(other)
        assert type(other) is StableDiffusionPipeline and torch.equal(run(other), plain)


def test_a_class_that_another_library_derives_from_ours(pipe) -> None:
    """It stays when S-CFG goes, and S-CFG can come back."""
    plain = run(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    pipe.__class__ = Fast = type("Fast", (type(pipe),), {})
    assert torch.equal(run(pipe), guided)
    scfg_fast.disable(pipe)
    assert type(pipe) is Fast and torch.equal(run(pipe), plain)
    scfg_fast.enable(pipe)
    assert type(pipe) is Fast and torch.equal(run(pipe), guided)


def test_a_class_that_was_put_back_by_another_library(pipe) -> None:
    scfg_fast.enable(pipe)
    guided = run(pipe)
    pipe.__class__ = StableDiffusionPipeline
    scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), guided)


def test_classes_that_are_made_per_request_are_collected() -> None:
    pipe = tiny_sd_pipeline(sample_size=16)
    classes = []
    for _ in range(3):
        cls = everything(StableDiffusionPipeline)
        pipe.__class__ = cls
        scfg_fast.enable(pipe)
        run(pipe, num_inference_steps=1)
        classes += [weakref.ref(cls), weakref.ref(type(pipe))]
        scfg_fast.disable(pipe)
        pipe.__class__ = StableDiffusionPipeline
        del cls
    gc.collect()
    assert [reference() for reference in classes] == [None] * 6


# Calls of other shapes.


class Twice(StableDiffusionPipeline):
    """A draft and the final picture."""

    def __call__(self, prompt=None, num_inference_steps=3, guidance_scale=7.5, generator=None, output_type="latent"):
        call = super().__call__
        options = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type="latent")
        return [call(prompt, generator=torch.Generator().manual_seed(0), **options)[0] for _ in range(2)]


@pytest.mark.parametrize("settings", [
    {}, {"config": SCFGConfig(rates="none"), "schedule": WeightSchedule("linear")}, {"config": SCFGConfig(stop=0.5)},
    {"config": SCFGConfig(reuse_every=2)},
], ids=["regions", "schedule", "stop", "reuse"])  # fmt: skip
def test_the_second_run_in_a_call_is_as_the_first(pipe, settings: dict) -> None:
    plain = run(pipe)
    pipe.__class__ = Twice
    handle = scfg_fast.enable(pipe, strict=True, **settings)
    first, second = pipe("a red cat")
    assert torch.equal(first, second) and not torch.equal(first, plain)
    assert len(handle.stats.weights) == 6 and handle.stats.weights[:3] == handle.stats.weights[3:]


class Own(StableDiffusionPipeline):
    """A loop of its own that keeps the scale in a local variable, and gives the class's properties nothing to read."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=3, guidance_scale=7.5, generator=None, output_type="latent"):
        cond, uncond = self.encode_prompt(prompt, self.device, 1, True)
        both = torch.cat([uncond, cond])
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 4, 16, 16, generator=generator, dtype=both.dtype)
        for t in self.scheduler.timesteps:
            u, c = self.unet(torch.cat([x] * 2), t, encoder_hidden_states=both).sample.chunk(2)
            x = self.scheduler.step(u + guidance_scale * (c - u), t, x).prev_sample
        return (x,)


def test_a_loop_of_ones_own_is_read_by_the_arguments_that_it_names(pipe) -> None:
    scfg_fast.enable(pipe)
    guided = run(pipe)
    scfg_fast.disable(pipe)
    pipe.__class__ = Own
    for name in ("_guidance_scale", "_num_timesteps", "_guidance_rescale"):
        delattr(pipe, name)
    handle = scfg_fast.enable(pipe, strict=True)
    torch.testing.assert_close(run(pipe), guided, rtol=0, atol=1e-5)
    assert handle.stats.steps_applied == 3


class Hidden(StableDiffusionPipeline):
    """A loop of its own behind arguments without names."""

    def __call__(self, *args, **kwargs):
        return Own.__call__(self, *args, **kwargs)


def test_a_call_in_which_nothing_could_be_guided_says_so(pipe) -> None:
    pipe.__class__ = Hidden
    plain = run(pipe)
    scfg_fast.enable(pipe)
    with pytest.warns(SCFGWarning, match="Hidden ran the denoiser without a call of StableDiffusionPipeline") as said:
        assert torch.equal(run(pipe), plain)
    assert len(said) == 1
    scfg_fast.enable(pipe, strict=True)
    with pytest.raises(SCFGError, match="Hidden ran the denoiser"):
        run(pipe)


def test_switched_off_it_says_nothing(pipe) -> None:
    pipe.__class__ = Hidden
    plain = run(pipe)
    scfg_fast.enable(pipe, strict=True)
    with scfg_fast.disabled(pipe):
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe, scfg_kwargs={"enabled": False}), plain)


def test_arguments_of_the_call_reach_a_subclass(pipe) -> None:
    pipe.__class__ = everything(StableDiffusionPipeline)
    scfg_fast.enable(pipe, SCFGConfig(rate_max=1.5))
    expected = run(pipe)
    scfg_fast.enable(pipe)
    assert torch.equal(run(pipe, scfg_kwargs={"rate_max": 1.5}), expected)


class Worker(StableDiffusionPipeline):
    """Runs the stock call in another thread."""

    def __call__(self, *args, **kwargs):
        results: list = []
        call = super().__call__
        thread = threading.Thread(target=lambda: results.append(call(*args, **kwargs)))
        thread.start()
        thread.join()
        return results[0]


def test_a_call_that_runs_in_another_thread_is_guided(pipe) -> None:
    scfg_fast.enable(pipe)
    guided = run(pipe)
    scfg_fast.disable(pipe)
    pipe.__class__ = Worker
    scfg_fast.enable(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(pipe), guided)


def test_a_wrapper_that_does_not_say_what_it_wraps(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    scfg_fast.enable(pipe)
    guided = run(pipe)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", wrapped(StableDiffusionPipeline.__call__, []))
    assert torch.equal(run(pipe), guided)


# Off and on.


def test_blocks_that_overlap(pipe) -> None:
    plain, handle = run(pipe), scfg_fast.enable(pipe)
    guided = run(pipe)
    first, second = scfg_fast.disabled(pipe), scfg_fast.disabled(pipe)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run(pipe), plain) and handle.stats.steps_applied == 0
    scfg_fast.disable(pipe)
    scfg_fast.enable(pipe)
    assert torch.equal(run(pipe), plain), "a block is open"
    second.__exit__(None, None, None)
    assert torch.equal(run(pipe), guided)


def test_blocks_in_threads(pipe) -> None:
    plain = run(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    inside, leave = threading.Barrier(9), threading.Event()

    def block() -> None:
        with scfg_fast.disabled(pipe):
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=block) for _ in range(8)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert torch.equal(run(pipe), plain)
    leave.set()
    for thread in threads:
        thread.join()
    assert torch.equal(run(pipe), guided)


def test_an_old_handle_takes_out_its_own_alone(pipe) -> None:
    old = scfg_fast.enable(pipe)
    scfg_fast.disable(pipe)
    scfg_fast.enable(pipe)
    guided = run(pipe)
    old.disable()
    assert torch.equal(run(pipe), guided)


class Wrapped(torch.nn.Module):
    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser, self.config = denoiser, denoiser.config

    dtype = property(lambda self: self.denoiser.dtype)
    device = property(lambda self: self.denoiser.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)


@pytest.mark.parametrize("kind", [Wrapped, torch.nn.DataParallel])
def test_a_denoiser_that_was_replaced_after_enable(case: Case, kind: type) -> None:
    scfg_fast.enable(case.pipe)
    attribute = "unet" if hasattr(case.pipe, "unet") else "transformer"
    before = getattr(case.pipe, attribute)
    setattr(case.pipe, attribute, kind(before))
    try:
        with pytest.raises(UnsupportedPipelineError, match=f"the denoiser is a {kind.__name__}, whose attention"):
            case.run()
    finally:
        setattr(case.pipe, attribute, before)
        scfg_fast.disable(case.pipe)


@pytest.mark.parametrize("bad, message", [
    ({"enabled": "no"}, r"scfg_kwargs\['enabled'\] must be True or False, got 'no'"),
    ({"enabled": 0}, r"scfg_kwargs\['enabled'\] must be True or False, got 0"),
    (5, "scfg_kwargs must be a dictionary or None, got 5"), ("", "scfg_kwargs must be a dictionary or None, got ''"),
    (0, "scfg_kwargs must be a dictionary or None, got 0"), ([], r"scfg_kwargs must be a dictionary or None, got \[\]"),
])  # fmt: skip
def test_settings_of_a_call_are_refused_by_name(pipe, bad: Any, message: str) -> None:
    scfg_fast.enable(pipe)
    with pytest.raises(TypeError, match=message):
        run(pipe, scfg_kwargs=bad)


def test_other_arguments_are_refused_by_name(pipe) -> None:
    with pytest.raises(TypeError, match="on_regions must be a function"):
        scfg_fast.enable(pipe, on_regions=5)
    with pytest.raises(TypeError, match="strict must be True or False, got 'yes'"):
        scfg_fast.enable(pipe, strict="yes")
    assert type(pipe) is StableDiffusionPipeline
    handle = scfg_fast.enable(pipe)
    with pytest.raises(TypeError, match="on_regions must be a function"):
        handle.on_regions = 5
    with pytest.raises(TypeError, match="strict must be True or False"):
        handle.strict = 1
    for function in (scfg_fast.disable, scfg_fast.enable, lambda p: scfg_fast.disabled(p).__enter__()):
        with pytest.raises((TypeError, UnsupportedPipelineError), match="NoneType"):
            function(None)
