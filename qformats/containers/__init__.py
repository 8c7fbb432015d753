"""Containers: byte sources, safetensors, GGUF, atomic output. No quantization knowledge."""
