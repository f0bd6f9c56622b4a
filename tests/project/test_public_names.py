"""The public names, as a snapshot: adding or removing one is a decision, not an accident."""

from __future__ import annotations

import inspect

import scfg_kernels

import scfg_fast
import scfg_fast.guidance

PACKAGE = [
    "Handle", "Regions", "SCFGConfig", "SCFGError", "SCFGWarning", "Stats", "Support", "UnsupportedPipelineError",
    "Watched", "__version__", "bundled_model_path", "disable", "disabled", "enable", "invert", "supports", "watch",
]  # fmt: skip
KERNELS = [
    "BackendError", "attention_map", "attention_maps", "attention_with_lse", "available_backends", "choose_backend",
    "complete", "complete_from_qk", "guide", "guide_pixels", "joint_attention_maps", "segment",
    "segment_and_guide", "smooth",
]  # fmt: skip
GUIDANCE = [
    "Augment", "CFGPlusPlus", "CharacteristicGuidance", "CharacteristicSolver", "LossGuidance", "SHAPES", "Step",
    "StepWeight", "WeightSchedule", "step_levels",
]  # fmt: skip


def test_public_names_of_the_package() -> None:
    assert sorted(scfg_fast.__all__) == PACKAGE
    for name in PACKAGE:
        assert getattr(scfg_fast, name) is not None


def test_public_names_of_the_guidance_family() -> None:
    assert sorted(scfg_fast.guidance.__all__) == GUIDANCE
    for name in GUIDANCE:
        assert getattr(scfg_fast.guidance, name) is not None


def test_public_names_of_the_kernels() -> None:
    assert sorted(scfg_kernels.__all__) == KERNELS
    for name in KERNELS:
        assert callable(getattr(scfg_kernels, name))


def test_every_public_callable_says_what_it_does() -> None:
    for module, names in ((scfg_fast, PACKAGE), (scfg_kernels, KERNELS)):
        undocumented = [n for n in names if callable(getattr(module, n)) and not inspect.getdoc(getattr(module, n))]
        assert not undocumented


def test_signatures_of_the_operators() -> None:
    assert list(inspect.signature(scfg_kernels.attention_with_lse).parameters) == ["q", "k", "v", "scale"]
    assert list(inspect.signature(scfg_kernels.attention_map).parameters) == ["q", "k", "lse", "scale", "backend"]
    guides = ("guide", "segment_and_guide", "guide_pixels")
    for name in (
        "attention_maps",
        "attention_map",
        "joint_attention_maps",
        "complete",
        "segment",
        *guides,
    ):
        backend = inspect.signature(getattr(scfg_kernels, name)).parameters["backend"]
        assert (backend.default, backend.kind) == ("auto", inspect.Parameter.KEYWORD_ONLY)
    for name in guides:
        rescale = inspect.signature(getattr(scfg_kernels, name)).parameters["rescale"]
        assert (rescale.default, rescale.kind) == (0.0, inspect.Parameter.KEYWORD_ONLY)
