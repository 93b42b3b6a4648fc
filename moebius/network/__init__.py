"""The networks: student, teacher, autoencoder, and their layers as written and in fast form."""
