"""The training entry with a Hugging Face cache per rank, as on nodes with local disks."""

import os
import sys

os.environ["HF_HUB_CACHE"] += os.environ["RANK"]

from megatron_let.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
