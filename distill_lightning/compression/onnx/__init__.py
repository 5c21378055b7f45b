"""ONNX files, their int8 versions, and ONNX Runtime, which runs both."""
