"""Training: the parts that learn, the objective, the loop, checkpoints, metrics and the exported model."""
