"""What derived teachers have in common: buffers that are fitted once on train patients, and saved with the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fitted(nn.Module):
    """`ready` says whether the buffers hold a fit: `done` was called, or a state dict of such a module was loaded."""

    fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        # A plain bool beside the tensor: asking the tensor at every step would wait for the accelerator.
        self.ready = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "ready", bool(module.fitted)))

    def done(self) -> None:
        self.fitted.fill_(True)
        self.ready = True
