"""Classify time series with a language model, without and with LET: the paper's Table 2."""

from megatron_let.cli.time_series import main

raise SystemExit(main())
