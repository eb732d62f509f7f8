"""Where the `mobula` command begins. Ctrl-C ends it without a traceback also while its modules are being imported."""

import signal


def main() -> None:
    """Runs the command line."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # not where a shell ignores it for what runs in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cluster.commands.cli import app

    signal.signal(signal.SIGINT, interrupt)
    app()
