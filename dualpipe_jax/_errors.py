"""Exceptions that more than one layer raises."""


class ScheduleError(ValueError):
    """Reports a schedule that cannot be run: naming action, rank and tick where there are any."""
