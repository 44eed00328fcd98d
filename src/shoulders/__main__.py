"""`python -m shoulders`."""

from shoulders.cli.app import main

main()
