"""Measure the curvature of the alignment loss by depth: `megatron-let curvature`."""

from megatron_let.cli.curvature import main

raise SystemExit(main())
