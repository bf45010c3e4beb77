"Exit with a message unless this Python is one that alf_nb supports; runs on any Python 3."
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "alf_nb needs Python 3.10 to 3.13, this is %d.%d: name another one, as in `make setup PYTHON=python3.12`"
        % sys.version_info[:2]
    )
