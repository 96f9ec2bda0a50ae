"""``python -m zaya_convert`` is the same as the console script ``zaya-convert``."""

from zaya_convert.cli.main import main

if __name__ == "__main__":
    main()
