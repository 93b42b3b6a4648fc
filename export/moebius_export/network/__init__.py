"""The modules that are exported, their cost, and the runtime `torch`."""
