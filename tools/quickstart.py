"""Train a small teacher, and a student without and with it: `megatron-let quickstart`."""

import sys

from megatron_let.cli.quickstart import main

sys.exit(main())
