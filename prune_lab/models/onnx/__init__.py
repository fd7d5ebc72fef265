"""Models as ONNX graphs: traced by transformers' exporter, run by ONNX Runtime."""
