"""The paper's tables and protocols, and comparison with classical methods."""
