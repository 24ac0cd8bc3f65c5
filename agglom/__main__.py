"""`python -m agglom` is `agglom`."""

import sys

from agglom.cli import main

sys.exit(main())
