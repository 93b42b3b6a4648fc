"""From the PyTorch checkpoint to a bundle that a device runs."""

from moebius_export._moved import MOVED
from moebius_runtime.moved import keep_old_paths

keep_old_paths(__name__, MOVED)
