"""All schedules on one model in one run: what each takes, and that all learn the same."""
