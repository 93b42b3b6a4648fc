"""Which nodes are INT8: simulation of quantized graphs, their errors, and the search within an error budget."""
