"""What ``python -m fastapi_ws_lite`` runs where it is installed; a copied module needs it not."""

import sys

from fastapi_ws_lite import _main

sys.exit(_main())
