"""What each degree of sharding over the data axis (ZeRO, FSDP) leaves on a device."""
