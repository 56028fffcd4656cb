"""The command line: one thin command per stage; the work is in the library functions they call."""


def main() -> None:
    """Entry point of `sda-fast` and `python -m sda_fast`."""
    import os
    import sys
    import warnings

    from sda_fast.cli.app import run
    from sda_fast.host_memory import keep_freed_memory

    if "--debug" not in sys.argv and not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to programmers
    keep_freed_memory()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for sda_fast.numerics
    run()
