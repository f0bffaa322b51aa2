"""Train a small teacher, and a student without and with it: `megatron-let quickstart`."""

from megatron_let.cli.quickstart import main

raise SystemExit(main())
