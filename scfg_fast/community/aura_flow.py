"""AuraFlowPipeline of diffusers with S-CFG on, for `from_pretrained(model, custom_pipeline=FILE)`.

Written by `python -m scfg_fast.community`. `scfg_kwargs` of a call overrides any parameter of `SCFGConfig`;
`{"enabled": False}` is plain guidance.
"""

# mypy: ignore-errors

import functools

from diffusers import AuraFlowPipeline

import scfg_fast


class SCFGAuraFlowPipeline(AuraFlowPipeline):
    @functools.wraps(AuraFlowPipeline.__init__)  # diffusers reads the components from the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scfg_fast.enable(self)
