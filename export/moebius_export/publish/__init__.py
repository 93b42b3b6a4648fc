"""Publishing bundles in a repository of a Hugging Face hub, with a model card."""
