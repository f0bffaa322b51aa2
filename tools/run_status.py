"""Show the state of a run of launch/: progress, speed, time left, checkpoint, restarts."""

import sys

from megatron_let.cli.status import main

sys.exit(main())
