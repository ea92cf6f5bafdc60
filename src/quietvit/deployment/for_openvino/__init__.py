"""OpenVINO: an IR out of the ONNX bytes, what it can be held to, its products cut out again."""
