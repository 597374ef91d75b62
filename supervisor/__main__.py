"""Entry point of ``wa-supervisor``, which is ``python -m supervisor``.

What is imported at a start is kept, so the search for garbage that it sets off some twenty times finds
nothing, and takes a tenth of the time. It is turned off here, and on again when all is imported
(:mod:`supervisor.cli`).
"""

import gc

gc.disable()

from supervisor.cli import main  # noqa: E402 -- see above

if __name__ == "__main__":
    main()
