import sys

from lion_kernels.conformance.command import main

sys.exit(main())
