"""Compare runs with their baseline: a table, pictures and one HTML page."""

from megatron_let.cli.compare import main

raise SystemExit(main())
