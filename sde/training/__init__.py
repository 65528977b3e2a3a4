"""Training: the loop, the averaged weights, checkpoints and the record of metrics."""
