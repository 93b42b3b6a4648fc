"""The networks: student, teacher, VAE, and their layers as unfused references and fused operators."""
