"""What one denoising step captures: which layers, and the maps that each of them leaves.

`layers` chooses the blocks, `processors` and `alongside` are the attention processors that run in them, `compared`
makes maps of queries and keys, and `maps` holds what the blocks leave.
"""

from .layers import BlockInfo, choose_layers, grid_size
from .maps import BatchLayout, StepMaps, collect

__all__ = ["BatchLayout", "BlockInfo", "StepMaps", "choose_layers", "collect", "grid_size"]
