"""Reports the mistakes of every command: one line on stderr, exit code 2."""

import click


class Refusal(click.ClickException):
    """Ends the command with one line on stderr and exit code 2."""

    exit_code = 2


class Command(click.Command):
    """Reports options that Click cannot read in one line too, without the usage above it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As `click.Command.parse_args`."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise Refusal(" ".join(error.format_message().split())) from error
