"""Reports the mistakes of every command: one line on stderr, exit code 2."""

import click

# A line names the value that it refuses, but not all of a very long one.
_LONGEST = 2000


class Refusal(click.ClickException):
    """Ends the command with one line on stderr and exit code 2."""

    exit_code = 2

    def __init__(self, message: str):
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} .. {message[-_LONGEST // 2 :]}"
        super().__init__(message)


class Command(click.Command):
    """Reports options that Click cannot read in one line too, without the usage above it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As `click.Command.parse_args`."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _in_one_line(error) from error


class Group(click.Group):
    """Reports commands and options that it does not know in one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As `click.Group.parse_args`."""
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _in_one_line(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As `click.Group.resolve_command`."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise _in_one_line(error) from error


def _in_one_line(error: click.UsageError) -> Refusal:
    return Refusal(" ".join(error.format_message().split()))
