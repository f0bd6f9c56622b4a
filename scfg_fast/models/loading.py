"""Saved pipelines, loaded with every weight or not at all.

The loaders of diffusers and transformers give a weight that the file lacks random numbers, and only log it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("diffusers", "transformers")


def load_pipeline(folder: str | Path, *, exact: bool = False, **options: Any) -> Any:
    """A pipeline from a diffusers folder: safetensors only, no code of the folder's own, no weight left to chance.

    Args:
        folder: with a ``model_index.json``.
        exact: whether weights that the model has no place for are an error too.
        options: of ``DiffusionPipeline.from_pretrained``, such as ``torch_dtype``.

    Raises:
        ValueError: the index is malformed or names code that is in neither library; or a weight is missing, has another
            shape or, if ``exact``, has no place. The message names the component and the weights.
        OSError: a file is missing.
    """
    import diffusers

    folder = Path(folder)
    pipeline, classes = read_index(folder)
    components: dict[str, Any] = {
        name: cls for name, cls in classes.items() if name not in options and issubclass(cls, torch.nn.Module)
    }
    loaded: dict[str, Any] = {}
    faults = []
    dtype = next((options[name] for name in ("dtype", "torch_dtype") if options.get(name) is not None), None)
    for name, cls in components.items():
        chosen = {} if dtype is None else {_dtype_argument(cls): dtype}
        if exact and cls.__module__.startswith("diffusers."):
            chosen["low_cpu_mem_usage"] = False  # with it, diffusers before 0.33 tells of no weight without a place
        loaded[name], info = cls.from_pretrained(
            str(folder / name), output_loading_info=True, use_safetensors=True, local_files_only=True, **chosen
        )
        faults += _faults(name, loaded[name], info, exact)
    if faults:
        raise ValueError(f"the weights do not fit: {'; '.join(faults)}; save it again with save_pretrained")
    return getattr(diffusers, pipeline).from_pretrained(
        str(folder), use_safetensors=True, local_files_only=True, **loaded, **options
    )


def read_index(folder: Path) -> tuple[str, dict[str, type]]:
    """(class of the pipeline in diffusers, component -> its class) of a folder. Imports nothing from the folder.

    Raises:
        ValueError: malformed, or a class that is in neither diffusers nor transformers.
    """
    import diffusers
    import transformers

    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model_index.json is not JSON: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"model_index.json must be a JSON object, it is {type(index).__name__}")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ValueError("model_index.json does not say in _class_name which pipeline this is")
    found = None if pipeline.startswith("_") else getattr(diffusers, pipeline, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"model_index.json names {pipeline!r}, which is no pipeline of diffusers {diffusers.__version__}; "
            "code of other origin is never run"
        )
    classes: dict[str, type] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, class_name = entry if len(entry) == 2 else (None, None)
        if not (isinstance(library, str) and isinstance(class_name, str)):
            raise ValueError(f"model_index.json: {name} must be [library, class], it is {entry!r}")
        home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        if home is None and library.isidentifier():
            home = getattr(diffusers.pipelines, library, None)  # such as stable_diffusion, for its safety checker
        cls = None if class_name.startswith("_") else getattr(home, class_name, None)
        if not inspect.isclass(cls):
            raise ValueError(
                f"model_index.json: {name} names {class_name!r} of {library!r}, which neither diffusers "
                f"{diffusers.__version__} nor transformers {transformers.__version__} has; code of other origin is "
                "never run"
            )
        if not (folder / name).is_dir():
            raise ValueError(f"the folder {name}, which model_index.json names, is missing")
        classes[name] = cls
    return pipeline, classes


def _dtype_argument(cls: type) -> str:
    """How a library calls the dtype of what it loads."""
    library = cls.__module__.partition(".")[0]
    version = __import__(library).__version__ if library in LIBRARIES else "0"
    return "dtype" if library == "transformers" and int(version.split(".")[0]) >= 5 else "torch_dtype"


def _faults(name: str, module: torch.nn.Module, info: Any, exact: bool) -> list[str]:
    """What is wrong with the weights of a component, in words."""
    state = module.state_dict(keep_vars=True)
    missing = set(info["missing_keys"])
    there = {value.data_ptr() for key, value in state.items() if key not in missing}
    missing = {key for key in missing if key not in state or state[key].data_ptr() not in there}  # others are tied
    shapes = {entry[0] if isinstance(entry, tuple | list) else entry for entry in info.get("mismatched_keys") or ()}
    found = {"missing": missing, "of another shape": shapes}
    if exact:
        found["without a place"] = set(info["unexpected_keys"])
    return [f"{name} has {len(keys)} {what}, such as {min(keys)}" for what, keys in found.items() if keys]


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of diffusers and transformers during the block."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
