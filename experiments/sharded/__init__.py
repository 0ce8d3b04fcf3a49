"""The bytes of a step on a device, by the mesh axes over which its leaves are sharded."""
