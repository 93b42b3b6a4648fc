"""`moebius-bench`: what a bundle costs on this machine, measured so that two figures may be compared."""

from moebius_bench._moved import MOVED
from moebius_runtime.moved import keep_old_paths

keep_old_paths(__name__, MOVED)
