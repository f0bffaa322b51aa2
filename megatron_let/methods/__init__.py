"""What each training method does around one step of Megatron."""
