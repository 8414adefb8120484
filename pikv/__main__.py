"""`python -m pikv` is the command `pikv`."""

import sys

from pikv.cli.main import main

sys.exit(main())
