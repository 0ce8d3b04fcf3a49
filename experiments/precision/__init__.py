"""Does bfloat16 learn as float32 does? The main job twice, side by side."""
