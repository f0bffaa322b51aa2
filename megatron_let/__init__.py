"""Late-to-Early Training on Megatron-Core: align an early layer with a small trained model."""

__version__ = "0.1.0"
