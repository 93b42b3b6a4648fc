"""`moebius-bench`: what a bundle costs on this machine, measured so that two figures may be compared."""
