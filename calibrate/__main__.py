"""`python -m calibrate`."""

from calibrate.commands import app
from datastore.console import run


def main() -> None:
    """Run the command line of calibrate."""
    run(app)


if __name__ == "__main__":
    main()
