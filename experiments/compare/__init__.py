"""All schedules side by side: losses, memory and time of a training, and idle time by replay."""
