"""Megatron's loop and model on DeepSpeed's engine: ZeRO 1 to 3 and offload, `--engine deepspeed`.

Only `launch` is imported before the engine is asked for; everything else here may import DeepSpeed.
"""
