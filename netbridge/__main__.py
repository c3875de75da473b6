"""`python -m netbridge`: the same as the `netbridge` command."""

import sys

from netbridge.cli import main

sys.exit(main())
