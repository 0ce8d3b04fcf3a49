"""The main job: train a small language model with a pipeline schedule, in one jitted step."""
