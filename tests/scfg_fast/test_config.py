"""SCFGConfig: the official defaults, validation that lists every reason, and round trips."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from scfg_fast import SCFGConfig


def test_the_defaults_are_the_published_codes_values() -> None:
    assert SCFGConfig().to_dict() == {
        "rates": "regions", "fidelity": "official", "cell": 4, "levels": "auto", "layers": "auto", "powers": 4,
        "blur_sigma": 0.5, "rate_min": 0.8, "rate_max": 3.0, "max_scale": 15.0, "start": 0.0,
        "stop": 1.0, "reuse_every": 1, "tokens": "all", "foreground": "auto", "reference": "auto",
        "dose": "as-published", "combine": "cfg", "eta": 1.0, "adaptive_projected_guidance_momentum": None,
        "adaptive_projected_guidance_rescale": 15.0, "zero_init_steps": 1, "backend": "auto",
    }  # fmt: skip
    assert SCFGConfig.official() == SCFGConfig()


def test_paper_has_no_smoothing_and_no_clamps() -> None:
    config = SCFGConfig.paper(powers=3)
    assert (config.fidelity, config.powers, config.blur_sigma) == ("paper", 3, 0.0)
    assert config.rate_min is config.rate_max is config.max_scale is None


def test_deepfloyd_has_one_clamp() -> None:
    config = SCFGConfig.deepfloyd(reference="foreground")
    assert config == SCFGConfig(rate_min=None, rate_max=None, reference="foreground")
    assert config.max_scale == 15.0


@pytest.mark.parametrize(
    "config",
    [
        SCFGConfig(),
        SCFGConfig.paper(foreground="conditional"),
        SCFGConfig(levels=[4, 8], layers=["a", "b"], start=0.25, tokens="words"),
    ],
    ids=["default", "paper", "lists"],
)
def test_round_trips(config: SCFGConfig, tmp_path) -> None:
    assert SCFGConfig.from_json(config.to_json()) == config
    assert SCFGConfig.from_dict(config.to_dict()) == config
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "scfg_config.json" and SCFGConfig.from_pretrained(path.parent) == config
    assert [p.name for p in path.parent.iterdir()] == ["scfg_config.json"]
    assert json.loads(config.to_json()) == config.to_dict()


def test_it_is_immutable_and_hashable() -> None:
    config = SCFGConfig(levels=[4, 8])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cell = 8
    assert hash(config) == hash(SCFGConfig(levels=(4, 8)))
    assert config.replace(cell=8).cell == 8 and config.cell == 4


BAD = {
    "fidelity": "exact", "cell": 3, "levels": [5], "layers": [], "powers": 0, "blur_sigma": -1.0, "rate_min": -0.5,
    "max_scale": float("inf"), "start": 0.9, "stop": 0.1, "reuse_every": 1.5, "tokens": "nouns", "backend": "cuda",
    "reference": "sky", "dose": "equal", "combine": "slerp", "eta": float("nan"),
    "adaptive_projected_guidance_momentum": "0", "adaptive_projected_guidance_rescale": -1.0, "zero_init_steps": -1,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_bad_value_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"SCFGConfig: .*{name}"):
        SCFGConfig(**{name: BAD[name]} if name not in ("start", "stop") else {"start": 0.9, "stop": 0.1})


def test_every_reason_is_listed_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        SCFGConfig(**BAD)
    assert all(name in str(caught.value) for name in BAD)


def test_bounds_that_cross() -> None:
    with pytest.raises(ValueError, match=r"rate_min must not exceed rate_max, got 2\.0 and 1\.0"):
        SCFGConfig(rate_min=2.0, rate_max=1.0)


@pytest.mark.parametrize(
    "make", [SCFGConfig.from_dict, lambda d: SCFGConfig().replace(**d)], ids=["from_dict", "replace"]
)
def test_unknown_names_are_refused_with_the_known_ones(make) -> None:
    with pytest.raises(ValueError, match=r"unknown parameters \['rate_maximum'\]; known are .*'rate_max'"):
        make({"rate_maximum": 2.0})


def test_json_that_is_not_an_object() -> None:
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        SCFGConfig.from_json("[1, 2]")


def test_the_former_name_of_reference_is_accepted() -> None:
    config = SCFGConfig(benchmark="image")
    assert config == SCFGConfig(reference="image") and config.benchmark == "image"
    assert SCFGConfig().replace(benchmark="image") == SCFGConfig.from_dict({"benchmark": "image"}) == config
    assert "benchmark" not in config.to_dict()
    names = list(inspect.signature(SCFGConfig).parameters)
    assert "reference" in names and "benchmark" not in names
    for make in (SCFGConfig, SCFGConfig().replace):
        with pytest.raises(ValueError, match="former name of reference"):
            make(benchmark="image", reference="image")
