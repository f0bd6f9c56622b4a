"""Pipelines that fail as their prompts say, for jobs in processes of their own.

`python -m tests.batch.pipelines PROMPTS OUT '{"load": "fake", "batch_size": 2}'` is the driver of such a job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


class FakePipeline:
    """Images from the generators alone. Words in a prompt decide what happens to its call.

    `dies`: the process is killed. `fails`: an exception. `nan`: pixels that are no numbers. `big`: out of memory with
    more than two images. `slow`: a call takes half a second.
    """

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(
        self, prompt, generator, output_type, negative_prompt=None, height=64, width=64, num_inference_steps=4,
        guidance_scale=5.0,
    ) -> SimpleNamespace:  # fmt: skip
        import torch

        words = {word for text in prompt for word in text.split()}
        if "slow" in words:
            time.sleep(0.5)
        if "dies" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "fails" in words:
            raise RuntimeError("this prompt fails")
        if "big" in words and len(prompt) > 2:
            raise MemoryError("out of memory")
        images = np.stack([torch.rand(height, width, 3, generator=each).numpy() for each in generator])
        for image, text in zip(images, prompt, strict=True):
            if "nan" in text.split():
                image[0] = np.nan
        return SimpleNamespace(images=images)


def fake() -> FakePipeline:
    return FakePipeline()


def main() -> int:
    from scfg_fast.batch import generate

    prompts, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    load = options.pop("load", None)
    if load is not None:
        from tests.batch import pipelines  # by its name, so that Ray's workers can import it

        options["load"] = getattr(pipelines, load)
    summary = generate(Path(prompts), out, **options)
    print(summary)
    return summary.exit_status


if __name__ == "__main__":
    sys.exit(main())
