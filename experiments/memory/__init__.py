"""What a step holds in a device's memory, by its own account and by the TPU compiler's."""
