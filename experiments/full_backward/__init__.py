"""What does a full backward cost beside an input grad and a weight grad? Read off TPU programs."""
