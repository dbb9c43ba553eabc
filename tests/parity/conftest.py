"""The reference runs on one thread: on busy cores, more wait for each other for seconds."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
