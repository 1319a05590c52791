"""`python -m saejax`: the command line."""

import sys

from saejax.cli.main import main

sys.exit(main())
