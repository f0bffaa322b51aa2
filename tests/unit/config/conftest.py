"""The parser of Megatron and LET together."""

from __future__ import annotations

import argparse
import warnings

import pytest

from megatron_let.config.arguments import add_arguments


@pytest.fixture(scope="session")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
