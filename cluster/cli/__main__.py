"""`python -m cluster.cli`, where the script is not on the path."""

import sys

from cluster.cli import main

sys.exit(main())
