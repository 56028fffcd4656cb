"""`python -m sda_fast`: the same as `sda-fast`."""

from sda_fast.cli import main

if __name__ == "__main__":
    main()
