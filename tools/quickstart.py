"""Train the same small model without and with a real teacher, and compare."""

import sys

from megatron_let.cli.quickstart import main

sys.exit(main())
