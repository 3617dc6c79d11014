"""Two threads are all that CI has; one per test process keeps pytest-xdist from oversubscribing them."""

import torch

torch.set_num_threads(1)
