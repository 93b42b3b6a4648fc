"""How to fill: options, the modes that give them defaults, and the values of a run."""
