"""`python -m hf_actnn` is the command `hf-actnn`."""

from __future__ import annotations

import sys

from hf_actnn.cli import main

sys.exit(main())
