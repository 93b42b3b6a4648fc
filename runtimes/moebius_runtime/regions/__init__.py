"""Squares of a picture that the network fills: found from the mask, resampled, and their unknown pixels."""

from moebius_runtime.regions.resampling import *  # noqa: F403
