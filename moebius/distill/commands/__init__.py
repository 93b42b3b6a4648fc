"""Commands of `moebius-distill`, one a file. Heavy imports sit inside, so that `--help` is quick."""
