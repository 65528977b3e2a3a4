"""The density of data under a model: what log p(x) is, and bounds on it."""
