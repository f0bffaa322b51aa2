"""Train the variants of a sweep in turn on this machine, and compare them on one page."""

from megatron_let.cli.sweep import main

raise SystemExit(main())
