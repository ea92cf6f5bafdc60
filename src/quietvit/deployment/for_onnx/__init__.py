"""ONNX: a marked graph, lowered to integers, as bytes; and its products cut out again."""
