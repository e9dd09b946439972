"""`python -m aroma`: the command line, for launchers such as torchrun that start modules."""

import sys

from .cli import main

sys.exit(main())
