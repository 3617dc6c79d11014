"""Settings that must stand before torch and triton are used."""

import os

import torch

# Two cores are all that CI has; one thread per test process keeps pytest-xdist from oversubscribing them.
torch.set_num_threads(1)
# Without a GPU, Triton kernels run in its interpreter, which it decides on when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
