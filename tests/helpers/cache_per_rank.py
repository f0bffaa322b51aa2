"""The training entry with a Hugging Face cache per rank, as on nodes with local disks."""

import importlib
import os
import sys

from huggingface_hub import constants

from megatron_let.pretrain import main

if __name__ == "__main__":
    os.environ["HF_HUB_CACHE"] += os.environ["RANK"]
    importlib.reload(constants)
    sys.exit(main())
