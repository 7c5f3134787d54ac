"""`python -m stf`: the command `stf`."""

import sys

from stf_command import main

if __name__ == "__main__":
    sys.exit(main())
