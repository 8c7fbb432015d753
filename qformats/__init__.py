"""Read, write and convert quantized model checkpoints without losing a bit."""
