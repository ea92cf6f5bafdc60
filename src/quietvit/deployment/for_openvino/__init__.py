"""OpenVINO: convert ONNX to an IR, read its kernels, and run its products singly."""
