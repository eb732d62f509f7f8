"""Settings of every test."""

import torch
from hypothesis import settings

settings.register_profile("mobula", deadline=None)  # a busy machine is not a fault
settings.load_profile("mobula")
torch.set_num_threads(1)
