"""One thread: the models of the tests are too small for more, and their workers would only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for processes that tests start

import torch

torch.set_num_threads(1)
