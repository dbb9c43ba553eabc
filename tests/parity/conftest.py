"""Runs torch on one thread: on busy cores, several threads wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
