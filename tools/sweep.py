"""Train the variants of a sweep in turn on this machine, and compare them on one page."""

import sys

from megatron_let.cli.sweep import main

sys.exit(main())
