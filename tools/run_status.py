"""Show the state of a run of launch/: progress, speed, time left, checkpoint, restarts."""

from megatron_let.cli.status import main

raise SystemExit(main())
