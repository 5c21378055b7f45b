"""Making a network small, in plain torch: steps that prune, factor, share and quantize its layers."""
