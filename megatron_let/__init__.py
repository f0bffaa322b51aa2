"""Late-to-Early Training on Megatron-Core: a small trained model teaches an early layer."""

__version__ = "0.1.0"
