"""Megatron's training loop and model on DeepSpeed's engine: ZeRO 1 to 3 and offload.

`engine` is the interface; modules that import DeepSpeed are imported when the engine is enabled.
"""
