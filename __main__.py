"""`python -m mxloom` is the command `mxloom`."""

from .compiler.command_line import main

raise SystemExit(main())
