"""Compare runs with their baseline: a table, pictures and one HTML page."""

import sys

from megatron_let.cli.compare import main

sys.exit(main())
