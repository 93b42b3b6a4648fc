"""INT8: ranges on trajectories, and the files that compute with them."""

from moebius_calibration._moved import MOVED
from moebius_runtime.moved import keep_old_paths

keep_old_paths(__name__, MOVED)
