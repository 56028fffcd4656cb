"""The command line: one thin command per stage; the work is in the library functions they call."""


def main() -> None:
    """Entry point of `sda-fast` and `python -m sda_fast`."""
    from sda_fast.cli.app import run

    run()
