"""`python -m fastm2rec.cli`."""

import sys

from . import main

sys.exit(main())
