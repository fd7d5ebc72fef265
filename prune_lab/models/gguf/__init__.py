"""Models as GGUF files that llama.cpp loads: what it has of each family, names and layouts of tensors, vocabularies."""
