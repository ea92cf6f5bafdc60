"""ONNX: capture a marked graph, lower it to integers, write it, and run its products singly."""
