"""The commands of `moebius-export`. Heavy imports sit inside the functions."""
