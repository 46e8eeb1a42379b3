"""Commands of the toolkit, and what they share.

A command takes a second to import its modules, in which Ctrl-C would print a traceback. Here it ends the command without one,
until pipelines/engine/launch.py handles signals. A SIGINT that is ignored stays ignored.
"""

import os
import signal
import sys

# While Python imports the packages of a module that is started with -m, the name of the program is "-m".
_program = "-m" if sys.argv[:1] == ["-m"] else getattr(sys.modules["__main__"], "__file__", None) or ""
_starts_command = _program == "-m" or os.path.dirname(_program) == os.path.dirname(__file__)

if _starts_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
