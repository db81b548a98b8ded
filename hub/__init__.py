"""From parts to a checkpoint, from a checkpoint to an answer: what stands around the model."""
