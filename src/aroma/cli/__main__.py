"""`python -m aroma.cli`."""

import sys

from . import main

sys.exit(main())
