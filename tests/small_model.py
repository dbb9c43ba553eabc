"""The tiny recipe with narrower layers, as overrides of its configuration."""

SMALL = {
    "model.vision.width": 16,
    "model.vision.mlp_dim": 32,
    "model.decoder.width": 32,
    "model.decoder.head_dim": 8,
    "model.decoder.mlp_dim": 32,
    "model.mamba.d_state": 4,
}
